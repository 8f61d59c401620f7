"""What a simulated request may hold."""

from __future__ import annotations

from preble_jax.errors import PromptTooLongError
from preble_jax.request import Request
from preble_jax.sched.limits import StepLimits


class SimLimits(StepLimits):
    """Prompts have no tokens here, only a length."""

    def check(self, request: Request) -> None:
        if len(request.prompt_token_ids) >= self.max_model_len:
            raise PromptTooLongError(
                f"prompt: expected at most {self.max_model_len - 1} tokens, got {len(request.prompt_token_ids)}; "
                "shorten it or give the group more room (--kv-tokens)"
            )
