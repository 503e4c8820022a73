"""Answers to many requests at once, each with an adapter of its own: continuous batching.

When its prompt has been read, a request joins the rows that decode together, one token each a step,
and leaves them when it ends. A slot of the pool is its own from beginning to end, so it answers
with the adapter that it began with, whatever is loaded meanwhile. Between two steps one prompt is
read, or several short ones together: those who wait come in by turns, and those who decode go on.

The rows' keys and values lie in one tensor a layer, aligned at their ends. What a shorter row lacks
in front is hidden by the mask, and left out as soon as the longest row has gone.
"""

from __future__ import annotations

import copy
import inspect
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation import (
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from fusedpeft.errors import InputError
from fusedpeft.serve.pool import AdapterPool
from fusedpeft.serve.text import Text

log = logging.getLogger(__name__)

# Tokens, padding among them, of prompts that are read together: what `multi_lora_linear` takes in
# one pass over the weights. Beyond, a prompt alone is as quick, and the others wait less.
READ = 64


class Busy(Exception):
    """As many requests wait as may."""


@dataclass(eq=False)
class Request:
    """What is asked, and what has come of it so far."""

    ids: Sequence[int]  # of the prompt
    adapter: str | None = None  # None: the base alone
    max_tokens: int = 256
    temperature: float = 0.0  # 0: the likeliest token
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    seed: int | None = None  # the same seed, the same answer; None: another each time
    stop: Sequence[str] = ()  # the answer ends before any of these
    trim: bool = False  # no space before its first word: what a turn of a chat begins with
    on_text: Callable[[str], None] = lambda piece: None  # in the engine's thread, as text comes
    on_end: Callable[[Request], None] = lambda request: None  # there too

    tokens: list[int] = field(default_factory=list, init=False)
    text: str = field(default="", init=False)
    finish: str | None = field(default=None, init=False)  # stop, length, cancelled or error
    error: Exception | None = field(default=None, init=False)
    # time.monotonic(): handed in, first token, end.
    began: float = field(default=0.0, init=False)
    first: float = field(default=0.0, init=False)
    ended: float = field(default=0.0, init=False)
    done: threading.Event = field(default_factory=threading.Event, init=False)
    cancelled: bool = field(default=False, init=False)


class _Row:
    """A request that decodes."""

    def __init__(self, request: Request, slot: int, text: Text, device: torch.device) -> None:
        self.request, self.slot, self.text = request, slot, text
        self.length = 0  # of its keys and values; where its next token stands
        # In the order of transformers' generate().
        self.warpers = []
        self.random = None
        if request.temperature > 0:
            # One that fp32 cannot divide by is the likeliest token's as well.
            self.warpers.append(TemperatureLogitsWarper(max(float(request.temperature), 1e-5)))
            if request.top_k:
                self.warpers.append(TopKLogitsWarper(request.top_k))
            if request.top_p < 1.0:
                self.warpers.append(TopPLogitsWarper(request.top_p))
            self.random = torch.Generator(device)
            if request.seed is None:
                self.random.seed()
            else:
                self.random.manual_seed(request.seed)

    def sample(self, logits: Tensor) -> int:
        """logits [V]. Of the best one 0 is left, whatever the temperature divides by."""
        one = (logits - logits.amax())[None]
        for warper in self.warpers:
            one = warper(None, one)
        return int(torch.multinomial(one.softmax(-1)[0], 1, generator=self.random))


class Engine:
    """Runs the model that `pool` is installed in. `start` gives it a thread of its own; without,
    `step` is whoever's: prompts read, and one token for each row.

    context: positions of the model, prompt and answer together; None: no limit. max_batch: rows
    that decode together; max_waiting: requests beyond them, before `submit` raises Busy.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        pool: AdapterPool,
        *,
        context: int | None = None,
        max_batch: int = 16,
        max_waiting: int = 256,
    ) -> None:
        for name, value in (("max_batch", max_batch), ("max_waiting", max_waiting)):
            if value < 1:
                raise InputError(f"{name}: expected a whole number >= 1, got {value}")
        self.model, self.pool = model.eval(), pool
        self.tokenizer = copy.deepcopy(tokenizer)  # one is for one thread, and this one decodes
        self.context, self.max_batch, self.max_waiting = context, max_batch, max_waiting
        names = inspect.signature(model.forward).parameters
        # transformers' new name and its old one.
        self._cache_name = "cache" if "cache" in names else "past_key_values"
        self._takes = [n for n in ("position_ids", "logits_to_keep") if n in names]
        self._vocabulary = model.get_input_embeddings().weight.shape[0]
        ends = model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        self._ends = {tokenizer.eos_token_id, *ends} - {None}
        self._rows: list[_Row] = []
        self._cache: DynamicCache | None = None  # of the rows, in their order
        self._waiting: deque[Request] = deque()
        self._wake = threading.Condition()  # guards _waiting and _closing
        self._closing = False
        self._thread: threading.Thread | None = None
        self._check_model()

    def _check_model(self) -> None:
        """Rows of unlike lengths, read and decoded together, against each alone without a cache: a
        model that keeps more than keys and values, looks ahead, or counts positions by the cache's
        length would answer wrongly, and most of them without a word."""
        exact = self.model.get_input_embeddings().weight.dtype in (torch.float32, torch.float64)
        texts = [[(5 * i + n) % self._vocabulary for i in range(n)] for n in (4, 7, 5)]
        asked = [Request(ids[:-1]) for ids in texts]
        try:
            for some in (asked[:2], asked[2:]):
                rows, cache, _ = self._read([(request, -1) for request in some])
                self._join(rows, cache)
            for request, ids in zip(asked, texts, strict=True):
                request.tokens.append(ids[-1])
            for ids, together in zip(texts, self._next(), strict=True):
                with self.pool.batch_of([-1]):
                    whole = torch.tensor([ids], device=self.model.device)
                    alone = self.model(input_ids=whole, use_cache=False).logits[0, -1].float()
                off = float((together - alone).norm() / alone.norm())
                if not off <= (0.01 if exact else 0.1):  # fp32 comes to 1e-5, 16 bits to 0.02
                    raise InputError(f"its logits are off by {100 * off:.0f} %")
        except Exception as error:
            raise InputError(
                f"{type(self.model).__name__}: expected a causal model that decodes rows of unlike "
                f"lengths over keys and values alone, got one that does not ({error})"
            ) from error
        finally:
            self._rows, self._cache = [], None

    # --- handing in -----------------------------------------------------------------------------

    def submit(self, request: Request) -> Request:
        """Queues it; its callbacks, and `done`, tell what becomes of it. From any thread. Raises
        InputError for what cannot be answered and Busy where too many wait."""
        self._check(request)
        with self._wake:
            if self._closing:
                raise Busy("the server is going down")
            if len(self._waiting) >= self.max_waiting:
                raise Busy(f"{self.max_waiting} requests wait already: try again later")
            request.began = time.monotonic()
            self._waiting.append(request)
            self._wake.notify()
        return request

    def cancel(self, request: Request) -> None:
        """From any thread; before its next token it ends, as "cancelled"."""
        request.cancelled = True

    def run(self, requests: Sequence[Request]) -> list[Request]:
        """All of them to their ends, in the caller's thread, of an engine that was not started.
        Waits while others hold every slot."""
        left = deque(requests)
        while left or not all(request.done.is_set() for request in requests):
            while left and len(self._waiting) < self.max_waiting:
                self.submit(left.popleft())
            self._step_or_wait()
        return list(requests)

    def _step_or_wait(self) -> None:
        if not self.step():  # every slot is held by others
            time.sleep(0.01)

    def _check(self, request: Request) -> None:
        if request.began:
            raise InputError("request: expected a new one, got one that was handed in before")
        if request.adapter is not None and request.adapter not in self.pool:
            raise self.pool.unknown(request.adapter)
        count = len(request.ids)
        if not count:
            raise InputError("prompt: expected at least one token, got none")
        if not all(0 <= i < self._vocabulary for i in request.ids):
            raise InputError(f"prompt: expected tokens 0..{self._vocabulary - 1}")
        if request.max_tokens < 1:
            raise InputError(f"max_tokens: expected >= 1, got {request.max_tokens}")
        self._check_room(request)
        if not 0.0 <= request.temperature < float("inf"):
            raise InputError(f"temperature: expected a number >= 0, got {request.temperature}")
        if not 0.0 < request.top_p <= 1.0:
            raise InputError(f"top_p: expected 0 < p <= 1, got {request.top_p}")
        if request.top_k < 0:
            raise InputError(f"top_k: expected >= 0 (0: all), got {request.top_k}")
        stop = request.stop
        if isinstance(stop, str) or not all(isinstance(s, str) and s for s in stop):
            raise InputError(f"stop: expected a list of texts, none of them empty, got {stop!r}")

    def _check_room(self, request: Request, virtual: int = 0) -> None:
        count = len(request.ids) + virtual
        if self.context is not None and count + request.max_tokens > self.context:
            of_those = f", {virtual} of them the adapter's own," if virtual else ""
            raise InputError(
                f"max_tokens: expected prompt and answer within the {self.context} tokens that the "
                f"model takes, got {count}{of_those} + {request.max_tokens}"
            )

    # --- a thread of its own --------------------------------------------------------------------

    def start(self) -> Engine:
        self._thread = threading.Thread(target=self._run, name="fusedpeft-engine", daemon=True)
        self._thread.start()
        return self

    def close(self) -> None:
        """Ends what waits and what runs, as "cancelled", and the thread."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._thread is not None:
            self._thread.join()
        for request in [*(row.request for row in self._rows), *self._waiting]:
            request.cancelled = True
        self._leave()

    def _run(self) -> None:
        while True:
            with self._wake:
                while not (self._waiting or self._rows or self._closing):
                    self._wake.wait()
                if self._closing:
                    return
            try:
                self._step_or_wait()
            except Exception as error:  # the thread is what all others wait for
                log.exception("the engine failed, and with it %d requests", len(self._rows))
                self._fail(error)

    @property
    def alive(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    @property
    def running(self) -> int:
        return len(self._rows)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    # --- a step ---------------------------------------------------------------------------------

    def step(self) -> bool:
        """Whether there was anything to do."""
        before = len(self._rows) + len(self._waiting)
        self._leave()
        group = self._admit()
        if group:
            self._prefill(group)
            self._leave()
        if self._rows:
            try:
                self._advance(self._rows, self._next())
            except Exception as error:  # out of memory, say: the next ones may have better luck
                log.exception("a step failed, and with it %d requests", len(self._rows))
                self._fail(error)
            self._leave()
        return bool(group or self._rows) or len(self._rows) + len(self._waiting) < before

    def _fail(self, error: Exception) -> None:
        for row in self._rows:
            self._end(row.request, "error", error)

    def _admit(self) -> list[tuple[Request, int]]:
        """Those who come in now, and the slot that each holds: the first who can have one, and as
        many behind him as can be read with him."""
        group, longest = [], 0
        for request in self._queue():
            width = max(longest, len(request.ids))
            full = len(self._rows) + len(group) >= self.max_batch
            if full or (group and width * (len(group) + 1) > READ):
                break
            try:
                (slot,) = self.pool.acquire([request.adapter])
            except InputError as error:  # evicted since
                self._take(request)
                self._end(request, "error", error)
                continue
            except ValueError:  # every slot is held: those of another adapter may come first
                continue
            prefix, prompt = self.pool.virtual_tokens(slot)
            if prompt and group:  # it would stand before the padding of its row
                self.pool.release([slot])
                break
            self._take(request)
            try:
                self._check_room(request, prefix + prompt)
            except InputError as error:
                self.pool.release([slot])
                self._end(request, "error", error)
                continue
            group.append((request, slot))
            longest = width
            if prompt:
                break
        return group

    def _queue(self) -> list[Request]:
        with self._wake:
            return list(self._waiting)

    def _take(self, request: Request) -> None:
        with self._wake:
            self._waiting.remove(request)

    def _prefill(self, group: list[tuple[Request, int]]) -> None:
        try:
            rows, cache, logits = self._read(group)
        except Exception as error:
            if len(group) > 1:  # whose fault it is, each alone will tell
                for one in group:
                    self._prefill([one])
                return
            ((request, slot),) = group
            if not isinstance(error, InputError):
                log.exception("a prompt of %d tokens failed", len(request.ids))
            self.pool.release([slot])
            return self._end(request, "error", error)
        self._join(rows, cache)
        self._advance(rows, logits)

    def _read(self, group: list[tuple[Request, int]]) -> tuple[list[_Row], DynamicCache, Tensor]:
        """Rows, their keys and values, and [rows, V], what may follow each prompt."""
        device, cache, given = self.model.device, DynamicCache(), {}
        width = max(len(request.ids) for request, _ in group)
        hidden = [width - len(request.ids) for request, _ in group]
        ids = [[0] * n + list(r.ids) for n, (r, _) in zip(hidden, group, strict=True)]
        if any(hidden):
            at = torch.arange(width, device=device) - torch.tensor(hidden, device=device)[:, None]
            given["attention_mask"] = (at >= 0).long()
            if "position_ids" in self._takes:
                given["position_ids"] = at.clamp(min=0)
        with self.pool.batch_of([slot for _, slot in group]):
            logits = self._logits(torch.tensor(ids, device=device), cache, **given)
        rows = [_Row(r, s, Text(self.tokenizer, r.ids, r.stop), device) for r, s in group]
        for row, n in zip(rows, hidden, strict=True):
            row.length = cache.get_seq_length() - n
        return rows, cache, logits

    def _next(self) -> Tensor:
        """[rows, V], what may follow each row's last token."""
        rows, device = self._rows, self.model.device
        ids = torch.tensor([[row.request.tokens[-1]] for row in rows], device=device)
        lengths = torch.tensor([row.length for row in rows], device=device)
        width = self._cache.get_seq_length()
        given = {}
        if any(row.length < width for row in rows):
            hidden = (width - lengths)[:, None]
            at = torch.arange(width + 1, device=device)
            given["attention_mask"] = (at >= hidden).long()
        if "position_ids" in self._takes:
            given["position_ids"] = lengths[:, None]
        with self.pool.batch_of([row.slot for row in rows], cached=True):
            logits = self._logits(ids, self._cache, **given)
        for row in rows:
            row.length += 1
        return logits

    def _logits(self, ids: Tensor, cache: DynamicCache, **given) -> Tensor:
        """[rows, V] of the last token, in fp32."""
        if "logits_to_keep" in self._takes:
            given["logits_to_keep"] = 1
        given[self._cache_name] = cache
        return self.model(input_ids=ids, use_cache=True, **given).logits[:, -1].float()

    def _advance(self, rows: list[_Row], logits: Tensor) -> None:
        for row, own in zip(rows, logits, strict=True):
            try:
                self._give(row, own)
            except Exception as error:
                log.exception("a token could not be drawn")
                self._end(row.request, "error", error)

    def _give(self, row: _Row, logits: Tensor) -> None:
        """The row's next token."""
        request = row.request
        most, at = logits.max(0)
        if not bool(most.isfinite()):  # NaN as well
            error = ValueError("the model's logits are not finite; is the adapter damaged?")
            return self._end(request, "error", error)
        token = row.sample(logits) if row.warpers else int(at)
        request.first = request.first or time.monotonic()
        request.tokens.append(token)
        over = token in self._ends
        piece, stopped = ("", False) if over else row.text.add(token)
        last = over or stopped or len(request.tokens) >= request.max_tokens
        if last and not stopped:
            more, stopped = row.text.rest()
            piece += more
        self._say(request, piece)
        if last:
            self._end(request, "stop" if over or stopped else "length")

    def _say(self, request: Request, piece: str) -> None:
        if request.trim and not request.text:
            piece = piece.lstrip()
        if piece:
            request.text += piece
            try:
                request.on_text(piece)
            except Exception:  # who listened has gone; the others have not
                log.exception("a request's on_text failed: it is cancelled")
                request.cancelled = True

    def _end(self, request: Request, finish: str, error: Exception | None = None) -> None:
        if request.finish is None:
            request.finish, request.error, request.ended = finish, error, time.monotonic()
            request.done.set()
            try:
                request.on_end(request)
            except Exception:
                log.exception("a request's on_end failed")

    # --- rows come and go -------------------------------------------------------------------------

    def _join(self, rows: list[_Row], cache: DynamicCache) -> None:
        """Behind the others, all aligned at their ends."""
        others, self._rows = (
            self._rows,
            [*self._rows, *rows],
        )  # first: a fault is then all of theirs
        if not others:
            self._cache = cache
        else:
            width = max(self._cache.get_seq_length(), cache.get_seq_length())
            for own, new in zip(self._cache.layers, cache.layers, strict=True):
                for name in ("keys", "values"):
                    pair = (getattr(own, name), getattr(new, name))
                    whole = [F.pad(t, (0, 0, width - t.shape[2], 0)) for t in pair]
                    setattr(own, name, torch.cat(whole))

    def _leave(self) -> None:
        """Without those that have ended, and those that nobody waits for any more."""
        for request in [r for r in self._queue() if r.cancelled]:
            self._take(request)
            self._end(request, "cancelled")
        for row in self._rows:
            if row.request.cancelled:
                self._end(row.request, "cancelled")
        kept = [i for i, row in enumerate(self._rows) if row.request.finish is None]
        if len(kept) == len(self._rows):
            return
        gone = [row.slot for row in self._rows if row.request.finish is not None]
        self._rows = [self._rows[i] for i in kept]
        if not kept:
            self._cache = None
        else:
            width = max(row.length for row in self._rows)
            index = torch.tensor(kept, device=self.model.device)
            for layer in self._cache.layers:
                for name in ("keys", "values"):
                    t = getattr(layer, name)
                    t = t[:, :, t.shape[2] - width :].index_select(0, index)
                    setattr(layer, name, t)
        self.pool.release(gone)
