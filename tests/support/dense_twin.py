"""A judge for training: a model with memory beside its twin, whose rows are an ordinary Parameter read by F.embedding.

Autograd, clipping, scalers and optimizers see the twin's rows as they see any parameter, so whatever loop trains the twin
must give the same rows and weights here, step for step, or be refused by name:

    verdict = judge(lambda trainee: plain_loop(trainee))        # called twice, with one of each
    assert verdict.says == "exact"

The twin's rows are stepped by torch.optim.SGD itself where that is the optimizer and "sgd" the row rule. Everywhere else
`reference_step` steps them: the formulas of `tables.rules`, in float64 on a dense gradient, by hooks of the optimizer.

EXACT bounds what is left: the two sum the same numbers in another order (a dense norm also runs over untouched zeros),
which moves last bits, and some steps of training carry these on. Most ways come out bit for bit; the largest difference
seen is 5e-5, by a rule that divides by a gradient's own size. A loop that loses one gradient is off by 0.1 or more.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn

import models
from engram_lm.attachment import MemoryConfig, attach, memories
from engram_lm.errors import EngramError
from engram_lm.tables import rule_from_json
from engram_lm.tables.rules import RowRule

# Largest difference of rows or weights beyond their last bits, as a part of how far the farthest of them moved.
EXACT, LAST_BITS = 2e-4, 2.0**-22


class Unchecked:
    """In the place of a table's RowGradients: nothing is pending, nothing is checked."""

    updates = run = 0

    def __init__(self, handle: nn.Parameter) -> None:
        self.handle = handle

    def check(self, *args: Any, **kwargs: Any) -> None: ...

    def weights_were_loaded(self, *args: Any) -> None: ...


class DenseTable:
    """The rows of a table as a Parameter; and another whose gradient marks the rows that a backward came to, zero or not.

    Marks live and die with the gradients of the rows, and are too small for any norm to see.
    """

    fetches_ahead, device = False, torch.device("cpu")

    def __init__(self, table: Any) -> None:
        self.n_rows, self.width, self.dtype = table.n_rows, table.width, table.dtype
        self.weight = nn.Parameter(table.rows_view().clone())
        self.marks = nn.Parameter(torch.zeros(table.n_rows, 1))
        self.gradients = Unchecked(table.gradients.handle)

    def read(self, address: Tensor, handle: Tensor, ticket: Any = None) -> Tensor:
        return _Marking.apply(F.embedding(address, self.weight), self.marks, address)

    def rows_view(self) -> Tensor:
        return self.weight.data


class _Marking(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, marks: Tensor, address: Tensor) -> Tensor:
        ctx.address, ctx.like = address, marks
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple:
        return gradient, torch.zeros_like(ctx.like).index_fill_(0, ctx.address.reshape(-1), 1e-30), None


def with_memory(rule: str = "sgd") -> nn.Module:
    """Two blocks of width 16, a memory with a conv on both and one without on the second, three tables in all."""
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=258, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.15, **models.TOKENS,
    )  # fmt: skip
    model = hf.LlamaForCausalLM(config)
    tokenizer = _tokenizer()
    shape = {"rows_per_head": 61, "head_width": 4, "heads": 1, "rule": rule}
    attach(model, tokenizer, MemoryConfig(layers=(0, 1), name="a", **shape))
    attach(
        model, tokenizer, MemoryConfig(layers=(1,), name="b", conv_kernel=0, conv_dilation=1, seed=5, **shape)
    )
    models.make_loud(model)
    return model.train()


@functools.cache
def _tokenizer() -> Any:
    return models.tokenizer()


def make_dense(model: nn.Module, *, is_plain: bool = True) -> nn.Module:
    """Exchange every table for a Parameter with its rows, which takes the place of the handle among the parameters.

    is_plain: rows that no mark is needed for, as a step of theirs with a gradient of zeros changes nothing.
    """
    for slot in slots(model):
        slot.table = DenseTable(slot.table)
        slot.handle.requires_grad_(False)
        slot.register_parameter("rows", slot.table.weight)
        if not is_plain:
            slot.register_parameter("marks", slot.table.marks)
        slot.table.marks.requires_grad_(not is_plain)
    return model


def slots(model: nn.Module) -> list[Any]:
    return [slot for memory in memories(model).values() for slot in memory.slots]


@dataclasses.dataclass
class Trainee:
    """A model in the hands of a training loop that must not know which of the two it is.

    told: what the loop saw on its way (norms, loss scales, whether it stepped); compared as well.
    """

    model: nn.Module
    rule: RowRule
    is_dense: bool
    told: list[float] = dataclasses.field(default_factory=list)

    def loss(self, i: int, **options: Any) -> Tensor:
        return self.model(input_ids=BATCHES[i], labels=BATCHES[i], use_cache=False, **options).loss

    def parameters(self) -> list[nn.Parameter]:
        """Those that train, the rows (or their handles) among them."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def rows(self) -> list[nn.Parameter]:
        return [slot.table.weight if self.is_dense else slot.handle for slot in slots(self.model)]

    def marks(self) -> list[nn.Parameter]:
        return [slot.table.marks for slot in slots(self.model)] if self.is_dense else []

    def rest(self) -> list[nn.Parameter]:
        rows = {id(parameter) for parameter in [*self.rows(), *self.marks()]}
        return [parameter for parameter in self.parameters() if id(parameter) not in rows]

    def optimizer(
        self, kind: Callable = torch.optim.SGD, parameters: Iterable | None = None, **options: Any
    ) -> torch.optim.Optimizer:
        given = self.parameters() if parameters is None else parameters
        optimizer = kind(given, **{"lr": 0.05 if self.rule.name == "sgd" else 0.005} | options)
        plain = {"maximize", "lr", "foreach", "fused"} >= set(options) and kind is torch.optim.SGD
        if self.is_dense and not (plain and self.rule.name == "sgd"):
            _ReferenceHooks(self).put_on(optimizer)
        return optimizer

    def copy(self, model: nn.Module) -> "Trainee":
        return Trainee(model, self.rule, self.is_dense, self.told)


BATCHES = [
    torch.randint(2, 258, (2, 12), generator=torch.Generator().manual_seed(1000 + i)) for i in range(24)
]


# ---- rows by the formulas ------------------------------------------------------------------------------------------


class _ReferenceHooks:
    """Steps dense rows by their rule in the place of the optimizer's own arithmetic."""

    def __init__(self, trainee: Trainee) -> None:
        self.rule, self.tables = trainee.rule, [slot.table for slot in slots(trainee.model)]
        self.states: list[dict[str, Tensor]] = [{} for _ in self.tables]
        self.hidden: list[tuple[nn.Parameter, Tensor]] = []

    def put_on(self, optimizer: torch.optim.Optimizer) -> None:
        optimizer.register_step_pre_hook(self.before)
        optimizer.register_step_post_hook(self.after)

    def before(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        scale = getattr(optimizer, "grad_scale", None)
        skipped = bool(getattr(optimizer, "found_inf", 0))
        for group in optimizer.param_groups:
            held = {id(parameter) for parameter in group["params"]}
            rate = -float(group["lr"]) if group.get("maximize") else float(group["lr"])
            for table, state in zip(self.tables, self.states, strict=True):
                gradient = table.weight.grad
                if id(table.weight) not in held or gradient is None:
                    continue
                if not skipped:
                    marks = gradient if table.marks.grad is None else table.marks.grad
                    gradient = gradient if scale is None else gradient / scale
                    reference_step(self.rule, table.weight.data, gradient, marks.any(1), state, rate)
                for parameter in (table.weight, table.marks):
                    self.hidden.append((parameter, parameter.grad))
                    parameter.grad = None

    def after(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for parameter, gradient in self.hidden:
            parameter.grad = gradient
        self.hidden.clear()


def reference_step(
    rule: RowRule, rows_RW: Tensor, gradient_RW: Tensor, touched_R: Tensor, state: dict, lr: float
) -> None:
    """One step of a row rule on a dense gradient, by the formulas of the rules' docstrings, for the rows touched."""
    rate, g = lr * rule.rate, gradient_RW[touched_R].double()
    if rule.name == "sgd":
        rows_RW.add_(gradient_RW, alpha=-rate)
        return

    def averaged(name: str, decay: float, new: Tensor, *shape: int) -> Tensor:
        whole = state.setdefault(name, torch.zeros(len(rows_RW), *shape, dtype=torch.float64))
        whole[touched_R] = decay * whole[touched_R] + (1 - decay) * new
        return whole[touched_R]

    n_R1 = state.setdefault("count", torch.zeros(len(rows_RW), 1, dtype=torch.float64))
    n_R1[touched_R] += 1
    n, width, square = n_R1[touched_R], g.shape[1], g.square().mean(1, keepdim=True)
    if rule.name == "row-rmsprop":
        step = g / (averaged("v", rule.decay, square, 1).sqrt() + rule.eps)
    elif rule.name == "row-adam":
        step = g / ((averaged("v", rule.beta2, square, 1) / (1 - rule.beta2**n)).sqrt() + rule.eps)
    elif rule.name == "row-adam-momentum":
        v = averaged("v", rule.beta2, square, 1) / (1 - rule.beta2**n)
        step = averaged("m", rule.beta1, g, width) / (1 - rule.beta1**n) / (v.sqrt() + rule.eps)
    else:
        b = rule.momentum
        step = b * averaged("m", b, g, width) + (1 - b) * g
        norm = step.norm(dim=1)
        step[norm <= rule.tau * norm.mean()] = 0
        for k in range(rule.balancings):
            norm = step.norm(dim=1 if k % 2 == 0 else 0, keepdim=True)
            step = step / norm.where(norm > 0, 1)
        step = step * rule.gamma * width**0.5
    rows_RW[touched_R] = (rows_RW[touched_R].double() - rate * step).float()


# ---- the judgement ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Verdict:
    """says: "exact"; "refused: ERROR"; "both raise ERROR"; or a text that begins with WRONG. why: the error's text."""

    says: str
    error: float = 0.0
    why: str = ""


def judge(run: Callable[[Trainee], Any], *, rule: str = "sgd") -> Verdict:
    """Let `run` train a model with memory and its twin, and compare what became of them."""
    own, twin = with_memory(rule), make_dense(with_memory(rule), is_plain=rule == "sgd")
    ours = Trainee(own, rule_from_json(rule), is_dense=False)
    dense = Trainee(twin, rule_from_json(rule), is_dense=True)
    start = _numbers(ours)
    raised, wanted = _run(run, ours), _run(run, dense)
    if isinstance(raised, EngramError):
        return Verdict(f"refused: {type(raised).__name__}", why=str(raised))
    if raised is not None or wanted is not None:
        same = type(raised) is type(wanted)
        says = f"both raise {type(raised).__name__}" if same else f"WRONG: {raised!r}, the twin {wanted!r}"
        return Verdict(says, why=str(raised))
    if len(ours.told) != len(dense.told) or not torch.allclose(
        torch.tensor(ours.told), torch.tensor(dense.told), rtol=EXACT, atol=1e-6, equal_nan=True
    ):
        return Verdict(f"WRONG: it saw {ours.told}, the twin {dense.told}")
    error = max(_difference(*three) for three in zip(start, _numbers(ours), _numbers(dense), strict=True))
    return Verdict("exact" if error <= EXACT else f"WRONG: off by {error:.1e} of what moved", error)


def _run(run: Callable[[Trainee], Any], trainee: Trainee) -> Exception | None:
    try:
        run(trainee)
    except Exception as error:
        return error
    return None


def _numbers(trainee: Trainee) -> list[Tensor]:
    """All rows, and all other parameters."""
    own = [*trainee.rows(), *trainee.marks(), *(slot.handle for slot in slots(trainee.model))]
    ids = {id(parameter) for parameter in own}
    rest = [p.detach().reshape(-1) for p in trainee.model.parameters() if id(p) not in ids]
    rows = [slot.table.rows_view().detach().reshape(-1) for slot in slots(trainee.model)]
    return [torch.cat(rows).clone(), torch.cat(rest).clone()]


def _difference(start: Tensor, ours: Tensor, dense: Tensor) -> float:
    """As a part of the farthest move; of 1 where nothing moved. NaN in one alone is infinitely far."""
    if not bool((ours.isnan() == dense.isnan()).all()):
        return float("inf")
    moved = float((dense - start).nan_to_num().abs().max()) or 1.0
    beyond = (ours - dense).nan_to_num().abs() - LAST_BITS * dense.nan_to_num().abs()
    return float(beyond.clamp(min=0).max()) / moved
