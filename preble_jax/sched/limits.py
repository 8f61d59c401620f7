"""What one step, and one request, of a device group may hold."""

from __future__ import annotations

from dataclasses import dataclass

from preble_jax.errors import InvalidRequestError, PromptTooLongError
from preble_jax.request import Request


@dataclass(frozen=True, kw_only=True)
class StepLimits:
    """max_model_len: tokens of a request, prompt and output, that context and page pool have room for.

    prefill_tokens, max_prefill_seqs: prompt tokens and prompt chunks a step.
    max_num_seqs: running sequences. max_waiting: queued ones.
    """

    vocab_size: int
    max_model_len: int
    prefill_tokens: int
    max_prefill_seqs: int
    max_num_seqs: int
    max_waiting: int

    def check(self, request: Request) -> None:
        """Raises InvalidRequestError or PromptTooLongError for a request that can never run."""
        prompt = request.prompt_token_ids
        if not len(prompt):
            raise InvalidRequestError("prompt: expected at least one token, got none")
        if len(prompt) >= self.max_model_len:
            raise PromptTooLongError(
                f"prompt: expected at most {self.max_model_len - 1} tokens (the context of {self.max_model_len} less "
                f"one to generate), got {len(prompt)}; shorten it"
            )
        low, high = min(prompt), max(prompt)
        if low < 0 or high >= self.vocab_size:
            raise InvalidRequestError(
                f"prompt: expected token ids in [0, {self.vocab_size - 1}], got {low if low < 0 else high}"
            )
