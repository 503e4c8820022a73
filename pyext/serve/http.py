"""The engine over HTTP, in the form that clients of OpenAI's API speak.

POST /v1/completions, /v1/chat/completions   "model" names an adapter, or the base
GET /v1/models                               what may be named
PUT, DELETE /v1/adapters/NAME                load, replace or forget one, while others answer
GET /metrics, /health, /                     Prometheus, a probe, and a page to try it on
"""

from __future__ import annotations

import asyncio
import hmac
import json
import re
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from importlib.resources import files
from pathlib import Path
from typing import Any

from fastapi import Depends, FastAPI, HTTPException, Response
from fastapi import Request as Call
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException as NotServed

from fusedpeft.errors import InputError
from fusedpeft.serve.engine import Busy, Engine, Request
from fusedpeft.serve.metrics import Metrics
from fusedpeft.serve.wire import Chat, Completion, Form, Load, failure

OPEN = ("/health", "/")  # what asks for no key
ENOUGH = 256  # tokens of an answer that nobody said a number for
_NAME = re.compile(r"[\w-][\w.-]*")  # of an adapter and its folder: no path leads out of it


def create_app(
    engine: Engine,
    base: str,
    encode: Callable[[str | Sequence[dict[str, str]]], list[int]],
    *,
    adapters: Path | None = None,
    key: str | None = None,
) -> FastAPI:
    """base: the name under which the model answers without an adapter. encode: the ids of a text,
    or of a conversation up to where the assistant begins; called from several threads. adapters:
    the folder whose folders clients may load, None for none. key: what they must bring
    ("Authorization: Bearer …"). The engine is started with the app and closed with it."""

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        await asyncio.to_thread(engine.close)

    def authorised(call: Call) -> None:
        if key is not None and call.url.path not in OPEN:
            scheme, _, got = call.headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not hmac.compare_digest(got.encode(), key.encode()):
                raise HTTPException(401, "expected the header 'Authorization: Bearer KEY'")

    app = FastAPI(
        title="fusedpeft", lifespan=life, dependencies=[Depends(authorised)], docs_url=None,
        redoc_url=None,
    )  # fmt: skip
    pool, metrics = engine.pool, Metrics(engine)

    # --- who may, and what goes wrong -------------------------------------------------------------

    @app.exception_handler(RequestValidationError)
    async def not_so(call: Call, error: RequestValidationError) -> JSONResponse:
        return JSONResponse(failure("; ".join(map(_in_words, error.errors()))), 400)

    @app.exception_handler(InputError)
    async def bad_input(call: Call, error: InputError) -> JSONResponse:
        return JSONResponse(failure(" ".join(str(error).split())), 400)

    @app.exception_handler(Busy)
    async def busy(call: Call, error: Busy) -> JSONResponse:
        said = failure(str(error), "rate_limit_error")
        return JSONResponse(said, 429, headers={"Retry-After": "1"})

    @app.exception_handler(NotServed)  # FastAPI's own is one of them
    async def refused(call: Call, error: NotServed) -> JSONResponse:
        kind = "authentication_error" if error.status_code == 401 else "invalid_request_error"
        ours = isinstance(error, HTTPException)
        said = str(error.detail) if ours else f"{call.method} {call.url.path}: {error.detail}"
        code = "model_not_found" if ours and error.status_code == 404 else None
        return JSONResponse(failure(said, kind, code), error.status_code)

    # --- answers ----------------------------------------------------------------------------------

    def adapter_of(name: str) -> str | None:
        if name == base:
            return None
        if name not in pool:
            raise HTTPException(404, f"model: expected one of {', '.join(known())}, got {name!r}")
        return name

    def known() -> list[str]:
        return [base, *pool.stats()["adapters"]]

    def ask(asked: Completion | Chat, ids: list[int], most: int | None) -> Request:
        if most is None:
            room = None if engine.context is None else engine.context - len(ids)
            most = ENOUGH if room is None else max(1, min(ENOUGH, room))
        return Request(
            ids, adapter_of(asked.model), max_tokens=most, temperature=asked.temperature,
            top_p=asked.top_p, top_k=asked.top_k, seed=asked.seed, stop=asked.stops,
        )  # fmt: skip

    async def answer(call: Call, asked: Completion | Chat, request: Request) -> Response:
        form, events = Form(asked), asyncio.Queue()
        loop = asyncio.get_running_loop()

        def put(event: str | Request) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        def ended(request: Request) -> None:
            metrics.ended(request)
            put(request)

        request.on_end = ended
        if asked.stream:
            request.on_text = put
        engine.submit(request)
        if asked.stream:
            return StreamingResponse(
                _stream(engine, form, request, events),
                media_type="text/event-stream",
                # Of a client who hung up before the first byte the generator learns nothing.
                background=BackgroundTask(engine.cancel, request),
            )
        try:
            while not request.done.is_set():
                if await call.is_disconnected():
                    break
                with suppress(asyncio.TimeoutError):  # is the client still there?
                    await asyncio.wait_for(events.get(), 0.5)
        finally:
            engine.cancel(request)  # nothing, where it has ended
        if request.finish in ("stop", "length"):
            return JSONResponse(form.whole(request))
        said, status = _what_failed(request)
        return JSONResponse(said, status)

    def of_text(asked: Completion) -> Request:
        ids = encode(asked.prompt) if isinstance(asked.prompt, str) else asked.prompt
        return ask(asked, ids, asked.max_tokens)

    def of_chat(asked: Chat) -> Request:
        if asked.max_tokens is not None and asked.max_completion_tokens is not None:
            raise InputError("max_tokens, max_completion_tokens: expected one of them, got both")
        ids = encode([message.plain() for message in asked.messages])
        request = ask(asked, ids, asked.max_tokens or asked.max_completion_tokens)
        request.trim = True
        return request

    # In a thread: a long text takes its time, and others' answers are on their way meanwhile.
    @app.post("/v1/completions")
    async def completions(call: Call, asked: Completion) -> Response:
        return await answer(call, asked, await asyncio.to_thread(of_text, asked))

    @app.post("/v1/chat/completions")
    async def chat(call: Call, asked: Chat) -> Response:
        return await answer(call, asked, await asyncio.to_thread(of_chat, asked))

    # --- adapters ---------------------------------------------------------------------------------

    @app.get("/v1/models")
    def models() -> dict:
        own = {"object": "model", "created": 0, "owned_by": "fusedpeft"}
        return {
            "object": "list",
            "data": [{"id": n, **own, "parent": None if n == base else base} for n in known()],
        }

    @app.put("/v1/adapters/{name}")
    def load(name: str, asked: Load | None = None) -> dict:
        if adapters is None:
            raise HTTPException(403, "the server was started without a folder of adapters")
        folder = name if asked is None or asked.folder is None else asked.folder
        for what, given in (("name", name), ("folder", folder)):
            if not _NAME.fullmatch(given):
                raise InputError(f"{what}: expected letters, digits, '-', '_', '.', got {given!r}")
        if name == base:
            raise InputError(f"name: expected another than the base's, got {name!r}")
        try:
            slot = pool.load(name, adapters / folder)
        except InputError:
            raise
        except ValueError as error:  # every slot is held
            raise Busy(str(error)) from error
        return {"id": name, "slot": slot}

    @app.delete("/v1/adapters/{name}")
    def forget(name: str) -> dict:
        if adapter_of(name) is None:
            raise InputError(f"name: expected an adapter's, got the base's, {name!r}")
        pool.evict(name)
        return {"id": name, "deleted": True}

    # --- looking ----------------------------------------------------------------------------------

    @app.get("/health")
    def health() -> Response:
        return JSONResponse(
            {"status": "ok" if engine.alive else "down"}, 200 if engine.alive else 503
        )

    @app.get("/metrics")
    def read_metrics() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/", response_class=HTMLResponse)
    def page() -> str:
        return files("fusedpeft.serve").joinpath("page.html").read_text(encoding="utf-8")

    return app


async def _stream(
    engine: Engine, form: Form, request: Request, events: asyncio.Queue
) -> AsyncIterator[str]:
    """Server-sent events, the last of them [DONE]. Who hangs up ends the request."""
    try:
        if form.chat:  # whose turn it is, as OpenAI's clients are told before there is text
            yield _event(form.piece("", first=True))
        while isinstance(event := await events.get(), str):
            yield _event(form.piece(event))
        if request.finish in ("stop", "length"):
            yield _event(form.last(request))
            if form.usage:
                yield _event(form.spent(request))
        else:
            yield _event(_what_failed(request)[0])
        yield "data: [DONE]\n\n"
    finally:
        engine.cancel(request)


def _event(data: dict) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


def _what_failed(request: Request) -> tuple[dict, int]:
    if isinstance(request.error, InputError):
        return failure(" ".join(str(request.error).split())), 400
    if request.error is not None:
        return failure(f"the request failed: {request.error}", "server_error"), 500
    return failure("the request was cancelled", "server_error"), 503


def _in_words(error: dict[str, Any]) -> str:
    """One of pydantic's findings: where, what was expected, what came."""
    where = ".".join(str(part) for part in error["loc"] if part != "body")
    if error["type"] == "json_invalid":
        return f"body: expected JSON, got something else ({error['ctx']['error']})"
    if error["type"] == "missing":
        return f"{where or 'body'}: expected a value, got none"
    if error["type"] == "extra_forbidden":
        return f"{where}: expected no field of this name: it is not served"
    got = repr(error.get("input"))
    return f"{where or 'body'}: {error['msg']}, got {got if len(got) < 80 else got[:80] + '…'}"
