"""An answer's text as its tokens come: no half characters, and nothing of a text that ends it."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

_HALF = "\ufffd"  # what bytes that are no character yet are decoded to
_CONTEXT = 6  # tokens of the prompt that the answer's first ones are decoded behind


class Text:
    """prompt: its ids, as the spaces around a token depend on what is before it. stop: texts, the
    first of which to appear ends the answer, itself left out."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], stop: Sequence[str]
    ) -> None:
        self.tokenizer, self.stop = tokenizer, tuple(stop)
        behind = (list(prompt[-n:]) for n in range(min(_CONTEXT, len(prompt)), 0, -1))
        self.ids = next((ids for ids in behind if _HALF not in self._decode(ids)), [])
        # What ids[:read] say is out. Decoded is from `begin` on, so that a token costs the same
        # however long the answer is.
        self.begin, self.read = 0, len(self.ids)
        self.held = ""  # may be the beginning of a stop

    def add(self, token: int) -> tuple[str, bool]:
        """The text that is certain now, and whether a stop has ended it."""
        self.ids.append(token)
        before = self._decode(self.ids[self.begin : self.read])
        now = self._decode(self.ids[self.begin :])
        if now.endswith(_HALF) or len(now) <= len(before):
            return "", False
        self.begin, self.read = self.read, len(self.ids)
        return self._cut(now[len(before) :])

    def rest(self) -> tuple[str, bool]:
        """What is left when no more tokens come."""
        before = self._decode(self.ids[self.begin : self.read])
        piece, stopped = self._cut(self._decode(self.ids[self.begin :])[len(before) :])
        return (piece, True) if stopped else (piece + self.held, False)

    def _cut(self, new: str) -> tuple[str, bool]:
        text = self.held + new
        found = [at for at in map(text.find, self.stop) if at >= 0]
        if found:
            return text[: min(found)], True
        keep = max((_overlap(text, stop) for stop in self.stop), default=0)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )


def _overlap(text: str, stop: str) -> int:
    """How many of the last characters of `text` may begin `stop`."""
    most = min(len(text), len(stop) - 1)
    return next((n for n in range(most, 0, -1) if text.endswith(stop[:n])), 0)
