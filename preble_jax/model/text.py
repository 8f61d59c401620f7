"""The text of an answer as its tokens arrive: whole characters, and nothing that a stop string may still take back."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence

from preble_jax.model.tokenizer import Tokenizer


class OutputText:
    """Turns one request's output tokens into text, piece by piece.

    The pieces of `push` and `finish` joined are `text`, and that is the whole decoding up to the first stop string
    (the one that is complete first; of two that end together, the longer), however the tokens were split over calls.

    stop:         strings that end the text; they are not part of it.
    skip_special: control tokens add nothing.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), *, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._skipped = tokenizer.special_ids if skip_special else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._shown: list[str] = []
        self._held = ""  # may be the beginning of a stop string; never contains a whole one
        self.num_tokens = 0
        """Tokens taken so far; once stopped, up to and with the one that completed the stop string."""
        self.stopped = False
        """A stop string came; later tokens are ignored."""

    @property
    def text(self) -> str:
        """Everything handed out so far."""
        return "".join(self._shown)

    def push(self, token_ids: Iterable[int]) -> str:
        """Takes new tokens; returns the text that can be shown now ("" when all of it has to wait)."""
        delta = []
        for token_id in token_ids:
            if self.stopped:
                break
            self.num_tokens += 1
            if token_id not in self._skipped:
                delta.append(self._take(self._decoder.decode(self._tokenizer.token_bytes(token_id))))
        return self._show("".join(delta))

    def finish(self) -> str:
        """No more tokens come; returns the text that was held back. A character that stayed half is U+FFFD."""
        if self.stopped:
            return ""
        delta = self._take(self._decoder.decode(b"", True))
        delta += self._held
        self._held = ""
        return self._show(delta)

    def _show(self, delta: str) -> str:
        if delta:
            self._shown.append(delta)
        return delta

    def _take(self, new: str) -> str:
        """Adds decoded text to what is held; returns what no stop string can take back any more."""
        if not self._stop or not new:
            return new
        text = self._held + new
        ends = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        if ends:
            self.stopped = True
            self._held = ""
            return text[: min(ends)[1]]
        keep = max(_overlap(text, stop) for stop in self._stop)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop` without being all of it."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
