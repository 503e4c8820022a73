"""What goes over the wire: OpenAI's completions and chat, as far as they are served, and errors.

A field that is not served is refused unless it says what happens anyway; none is ignored.
"""

from __future__ import annotations

import time
import uuid
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from fusedpeft.serve.engine import Request

NotEmpty = Annotated[str, StringConstraints(min_length=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(_Strict):
    include_usage: bool = False


class _Asked(_Strict):
    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=100, allow_inf_nan=False)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)  # not OpenAI's; 0: all
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: NotEmpty | list[NotEmpty] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None  # whose it is makes no difference
    n: Literal[1] = 1
    frequency_penalty: Literal[0] = 0
    presence_penalty: Literal[0] = 0

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class Completion(_Asked):
    prompt: NotEmpty | list[int]
    echo: Literal[False] = False
    logprobs: None = None
    best_of: Literal[1] = 1
    suffix: None = None


class TextPart(_Strict):
    type: Literal["text"]
    text: str


class Message(_Strict):
    role: Literal["system", "user", "assistant"]
    content: str | list[TextPart]

    def plain(self) -> dict[str, str]:
        parts = self.content
        said = parts if isinstance(parts, str) else "".join(part.text for part in parts)
        return {"role": self.role, "content": said}


class Chat(_Asked):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)  # OpenAI's newer name of max_tokens
    logprobs: Literal[False] | None = None
    tools: None = None
    response_format: None = None


class Load(_Strict):
    folder: str | None = None  # in the server's folder of adapters; None: the adapter's name


# --- answers ------------------------------------------------------------------------------------


class Form:
    """An answer as the client of `asked` expects it."""

    def __init__(self, asked: Completion | Chat) -> None:
        self.chat, self.model = isinstance(asked, Chat), asked.model
        prefix, self.kind = (
            ("chatcmpl", "chat.completion") if self.chat else ("cmpl", "text_completion")
        )
        self.id, self.created = f"{prefix}-{uuid.uuid4().hex}", int(time.time())
        self.usage = asked.stream_options is not None and asked.stream_options.include_usage

    def _about(self, chunk: bool, choices: list[dict], **more: Any) -> dict:
        kind = f"{self.kind}.chunk" if chunk and self.chat else self.kind
        own = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return {**own, "choices": choices, **more}

    def _choice(self, of_chat: dict, text: str, finish: str | None) -> dict:
        said = of_chat if self.chat else {"text": text}
        return {"index": 0, **said, "logprobs": None, "finish_reason": finish}

    def whole(self, request: Request) -> dict:
        message = {"message": {"role": "assistant", "content": request.text}}
        choice = self._choice(message, request.text, request.finish)
        return self._about(False, [choice], usage=usage(request))

    def piece(self, text: str, first: bool = False) -> dict:
        role = {"role": "assistant"} if first else {}
        return self._about(True, [self._choice({"delta": {**role, "content": text}}, text, None)])

    def last(self, request: Request) -> dict:
        return self._about(True, [self._choice({"delta": {}}, "", request.finish)])

    def spent(self, request: Request) -> dict:
        return self._about(True, [], usage=usage(request))


def usage(request: Request) -> dict[str, int]:
    asked, said = len(request.ids), len(request.tokens)
    return {"prompt_tokens": asked, "completion_tokens": said, "total_tokens": asked + said}


def failure(message: str, kind: str = "invalid_request_error", code: str | None = None) -> dict:
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}
