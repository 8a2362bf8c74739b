"""The page and its server: FastAPI and uvicorn around one model, its memories, and one index (docs/serve.md).

    engram-lm serve my-memory --index notes

    limits.py       how much one request may ask for
    http_errors.py  what is answered when it asks for something else
    access.py       who may ask: addresses, origins, the token, the key
    middleware.py   the same and the limits, around every request (ASGI)
    model_worker.py one thread that owns the model, and the line before it
    served_model.py the model and its tokenizer, prompts as ids
    served_index.py the index: read by all, written by one, changed by other processes too
    trace.py, next_token.py, generate.py    what the model is asked
    quiz.py         questions and the scoring of answers
    schema.py       requests and answers, as OpenAPI describes them
    app.py          the endpoints; page.py the page's files
    service.py      what the endpoints share: loading, ready, stopping
    command.py      `engram-lm serve`; demo.py what it shows without a model's name

Needs the extra `serve`. Nothing here is imported by other rooms.
"""
