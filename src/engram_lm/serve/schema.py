"""Requests and answers as JSON, and what OpenAPI says of them (GET /api/openapi.json).

Unknown fields are refused, so that a misspelt one is not taken for its default. Times are milliseconds, losses nats,
probabilities 0 to 1. Answers are built as plain dictionaries; the tests hold them to these models.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Probability = Annotated[float, Field(ge=0, le=1)]
_ID = 200


class Request(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=False)


class Answer(BaseModel):
    model_config = ConfigDict(extra="forbid", populate_by_name=True)


class ErrorAnswer(Answer):
    error: str = Field(description="One sentence: what was wrong, and what to do.")


# ---- requests ---------------------------------------------------------------------------------------------------------


class TraceRequest(Request):
    text: str = Field(description="The text to look into, sent as it is.")
    without: bool = Field(
        True,
        description="Whether the losses without tables come too; false is twice as fast: /api/losses has them.",
    )


class LossesRequest(Request):
    text: str
    tables: bool = Field(True, description="Whether the model has its tables. The index is left out.")


class NextRequest(Request):
    prompt: str
    lam: Probability | None = Field(None, description="λ of the mixture; null: what the gate says.")
    tables: bool = Field(True, description="Whether the model has its tables.")
    index: bool = Field(True, description="Whether the index is looked up.")
    k: int = Field(10, ge=1, le=1000, description="Tokens in each list.")
    candidates: list[str] = Field(
        default_factory=list, max_length=8, description="Whole continuations to compare, such as names."
    )


class GenerateRequest(Request):
    prompt: str
    chat: bool = Field(False, description="Put the prompt into the chat template as a user's turn.")
    max_tokens: int = Field(64, ge=1)
    arm: Literal["alone", "memory", "retrieval"] = Field(
        "alone",
        description="What the index does: nothing, mixed into every token, or passages in the prompt.",
    )
    tables: bool = Field(True, description="Whether the model has its tables, in every arm.")
    lam: Probability | None = Field(
        None,
        description="A fixed λ for arm memory (1 is taken as 0.999); null: gate, or pointing for questions.",
    )
    documents: list[str] | None = Field(
        None,
        max_length=200,
        description="For arm memory: ids to speak from; null: those the prompt is about.",
    )
    temperature: float = Field(0.0, ge=0, le=2)
    seed: int | None = Field(None, ge=0, lt=2**31, description="Of the draws at a temperature above 0.")


class NewDocument(Request):
    id: str = Field(min_length=1, max_length=_ID)
    text: str
    title: str | None = Field(None, max_length=500)
    licence: str | None = Field(None, max_length=500)


class AddRequest(Request):
    documents: list[NewDocument] = Field(min_length=1, max_length=200)
    replace: bool = Field(False, description="Put a document in the place of one with the same id.")


class DeleteRequest(Request):
    ids: list[str] = Field(min_length=1, max_length=1000)


class SearchRequest(Request):
    text: str
    limit: int = Field(10, ge=1, le=50)


class ExplainRequest(Request):
    text: str


class QuizAnswerRequest(Request):
    id: str
    arm: Literal["alone", "memory", "retrieval"] | None = Field(None, description="Let the model answer.")
    answer: str | None = Field(None, max_length=1000, description="What the visitor answered.")


# ---- answers ----------------------------------------------------------------------------------------------------------


class Health(Answer):
    status: Literal["ready", "loading"]
    busy: bool
    waiting: int = Field(description="Requests in the line before the model, the running one not counted.")


class ModelFacts(Answer):
    name: str
    parameters: int = Field(description="Without the tables and their layers.")
    vocab_size: int
    device: str
    chat: bool = Field(description="Whether it has a chat template.")


class TablesFacts(Answer):
    name: str
    layers: list[int]
    branches: int
    orders: list[int]
    heads: int
    rows: int
    bytes: int
    full_share: float = Field(description="The share `added` that is full red in generation.")
    full_share_why: str
    trained_on: str | None


class IndexFacts(Answer):
    documents: int
    tokens: int
    generation: int
    bytes: int


class GateFacts(Answer):
    name: str


class LimitFacts(Answer):
    body_bytes: int
    text_tokens: int
    new_tokens: int
    waiting: int


class About(Answer):
    model: ModelFacts
    tables: TablesFacts | None
    index: IndexFacts | None
    gate: GateFacts | None
    limits: LimitFacts
    version: str
    examples: dict[str, list[Any]]
    started_ms: float = Field(description="From the command to ready.")


class Ngram(Answer):
    order: int
    text: str
    addresses: list[int] = Field(description="Rows of this layer's table, one a head.")
    norm: float | None = Field(description="L2 of the heads' rows together.")


class LayerPart(Answer):
    memory: str
    layer: int
    gates: list[float | None] = Field(description="One a branch, 0 to 1; 0.5 where rows are zero.")
    added: float | None = Field(description="||update|| / ||residual||, of the strongest branch.")
    ngrams: list[Ngram]


class IndexPart(Answer):
    depth: int = Field(description="Tokens of the longest match before this token.")
    count: int = Field(description="How often that match stands in the index.")
    distinct: int = Field(description="How many different tokens follow it.")
    documents: int = Field(description="In how many documents, up to 16.")
    lam: float | None = Field(alias="lambda")
    p_model: float | None
    p_memory: float | None
    p: float | None
    r: float | None = Field(description="λ P_memory / P, the index's part of this token's probability.")


class Seen(Answer):
    order: int
    count: int | None = Field(description="In the index; null without one.")


class TracedToken(Answer):
    id: int
    text: str
    loss_off: float | None = Field(description="null for the first token, and where it was not wanted.")
    loss_tables: float | None = Field(description="null for the first token, and without tables.")
    loss: float | None = Field(description="With all there is.")
    tables: list[LayerPart] | None
    index: IndexPart | None
    seen: list[Seen]


class Trace(Answer):
    ms: float
    tokens: list[TracedToken]


class Losses(Answer):
    ms: float
    losses: list[float | None] = Field(description="Nats, one a token; null for the first.")


class Match(Answer):
    depth: int
    count: int
    distinct: int
    documents: int
    text: str


class ListedToken(Answer):
    id: int
    text: str
    p: float


class CandidateToken(Answer):
    id: int
    text: str
    p_model: float
    p_memory: float
    lam: float = Field(alias="lambda", description="What the gate says here, whatever λ the request pins.")


class Candidate(Answer):
    text: str
    tokens: list[CandidateToken]


class Passage(Answer):
    before: str
    match: str
    after: str


class Source(Answer):
    document: str
    count: int
    title: str | None
    licence: str | None
    passage: Passage


class Next(Answer):
    ms: float
    lam: float = Field(alias="lambda")
    match: Match | None
    model: list[ListedToken]
    memory: list[ListedToken]
    mix: list[ListedToken]
    candidates: list[Candidate]
    sources: list[Source]


class QueuedEvent(Answer):
    type: Literal["queued"]
    before: int


class StartEvent(Answer):
    type: Literal["start"]
    prompt_tokens: int
    retrieved: list[str]


class TokenEvent(Answer):
    type: Literal["token"]
    id: int
    text: str = Field(description="What this token adds; empty for a part of a character.")
    r: float = Field(description="The index's part of this token's probability.")
    tables: float | None = Field(description="|added| / |hidden state| against full red, 0 to 1.")
    lam: float | None = Field(alias="lambda")
    depth: int
    count: int
    documents: int


class DoneEvent(Answer):
    type: Literal["done"]
    ms: float
    tokens: int
    prompt_tokens: int
    first_token_ms: float | None
    text: str = Field(description="What an incomplete character at the end left over; mostly empty.")
    told: list[str]


class ErrorEvent(Answer):
    type: Literal["error"]
    error: str


Event = Annotated[QueuedEvent | StartEvent | TokenEvent | DoneEvent | ErrorEvent, Field(discriminator="type")]


class Added(Answer):
    ms: float
    added: list[str]
    tokens: int
    generation: int
    log: list[str]


class Deleted(Answer):
    ms: float
    deleted: list[str]
    generation: int
    log: list[str]


class ListedDocument(Answer):
    id: str
    title: str | None
    tokens: int
    added: float | None = Field(description="Seconds since 1970.")


class Documents(Answer):
    documents: list[ListedDocument]
    next: str | None = Field(description="Give it as `after` for the next ones.")


class Found(Answer):
    ms: float
    count: int = Field(description="How often the wording occurs in all.")
    hits: list[Source]


class Order(Answer):
    order: int
    count: int
    distinct: int


class Continuation(Answer):
    text: str = Field(description="Empty for the end of a document.")
    count: int
    p: float


class Explained(Answer):
    ms: float
    depth: int
    matched: str
    orders: list[Order]
    continuations: list[Continuation]
    documents: list[Source]


class QuizQuestion(Answer):
    id: str
    kind: Literal["verbatim", "paraphrased"]
    prompt: str
    document: str
    chat: bool


class Quiz(Answer):
    questions: list[QuizQuestion]


class QuizAnswered(Answer):
    right: bool
    expected: str
    answer: str | None = None
    ms: float | None = None
    prompt_tokens: int | None = None
