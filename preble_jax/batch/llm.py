"""`LLM`: prompts in, completed requests out, in one process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import numpy as np

from preble_jax.config import Config
from preble_jax.config_files import from_keywords, load_config
from preble_jax.engine.engine import Engine
from preble_jax.errors import InvalidRequestError
from preble_jax.kv.hashing import cache_salt
from preble_jax.model import registry
from preble_jax.model.chat import encode_chat
from preble_jax.model.text import OutputText
from preble_jax.model.tokenizer import Tokenizer, load_tokenizer
from preble_jax.progress import NullProgress, Progress, make_progress
from preble_jax.request import FinishReason, Request, RequestOutput
from preble_jax.sampling_params import SamplingParams

Prompt = str | Sequence[int]  # or a numpy array of integers
Message = Mapping[str, Any]


@dataclass(kw_only=True)
class CompletedRequest:
    """A prompt and what the model made of it.

    token_ids: with the token that ended it, if one did. text: without special tokens and without the stop string.
    logprobs: one per token when asked for, else None. cached_tokens: prompt tokens that were not computed.
    """

    prompt: str | None
    prompt_token_ids: list[int]
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: FinishReason | None = None
    cached_tokens: int = 0
    logprobs: list[float] | None = None


class LLM:
    """A model in this process.

    model:         registry name, Hugging Face folder, .gguf file, Orbax folder, or a config file (*.py).
    skip_tokenizer: prompts are token ids only, and `text` stays empty.
    settings:      any setting of the model, kv, engine, mesh and queue sections by its own name, for example
                   dtype="float32", page_size=32, max_num_seqs=16, tensor=2.

    Raises ConfigError for an unknown setting, NotFoundError for an unknown model, CheckpointError for a damaged one.
    Not thread safe.
    """

    def __init__(
        self,
        model: str = "smollm2-135m-instruct",
        *,
        skip_tokenizer: bool = False,
        progress: Progress | None = None,
        **settings: object,
    ) -> None:
        self._progress = progress or make_progress()
        self.config = _config(str(model), settings)
        self.tokenizer: Tokenizer | None = None
        if not skip_tokenizer:
            self.tokenizer = load_tokenizer(registry.resolve(self.config.model.name, self._progress))
        self.engine = Engine.create(self.config, self._progress)
        self._salt = cache_salt(self.config.model.name)
        self._ids = count()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        show_progress: bool = False,
    ) -> list[CompletedRequest]:
        """Completes all prompts and returns them in order.

        prompts: text, token ids, or a list of either; control tokens spelled in a text count (in `chat` they do not).
        sampling_params: one for all, or one a prompt.
        All prompts are checked before any is run: a bad one raises InvalidRequestError and nothing is computed.
        """
        batch = self._prompts(prompts)
        params = _params_for(sampling_params, len(batch))
        return self._run([self._job(p, s) for p, s in zip(batch, params, strict=True)], show_progress)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        show_progress: bool = False,
    ) -> list[CompletedRequest]:
        """Answers one conversation, or several, through the model's chat template."""
        tokenizer = self._require_tokenizer("chat")
        if not _is_list(messages):
            raise InvalidRequestError(
                "messages: expected a conversation, which is a list of messages, or a list of conversations, got"
                f' {messages!r:.80}; a single message is [{{"role": "user", "content": ...}}]'
            )
        many = [messages] if messages and isinstance(messages[0], Mapping) else messages
        prompts = [encode_chat(tokenizer, conversation, tools) for conversation in many]  # type: ignore[arg-type]
        return self.generate(prompts, sampling_params, show_progress=show_progress)

    def reset_prefix_cache(self) -> bool:
        """Forgets all cached pages. True unless a request was still running."""
        return self.engine.reset_prefix_cache()

    # -- one batch ---------------------------------------------------------------------------------

    def _prompts(self, prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
        if isinstance(prompts, str):
            return [prompts]
        if not isinstance(prompts, Sequence | np.ndarray) or isinstance(prompts, bytes | bytearray):
            raise InvalidRequestError(f"prompts: expected text, token ids, or a list of either, got {prompts!r:.80}")
        batch: list[Any] = list(prompts)
        if batch and _is_tokens(batch):
            return [batch]
        for i, prompt in enumerate(batch):
            if not isinstance(prompt, str) and not _is_tokens(prompt):
                raise InvalidRequestError(f"prompt {i}: expected text or a list of token ids, got {prompt!r:.80}")
        return batch

    def _job(self, prompt: Prompt, sampling: SamplingParams) -> _Job:
        tokenizer = self.tokenizer
        if isinstance(prompt, str):
            token_ids = self._require_tokenizer("a text prompt").encode(prompt, parse_special=True)
        else:
            token_ids = [int(token) for token in prompt]
        if sampling.stop:
            tokenizer = self._require_tokenizer("stop strings")
        eos = tokenizer.eos_token_ids if tokenizer and not sampling.ignore_eos else ()
        request = Request(
            request_id=f"offline-{next(self._ids)}",
            prompt_token_ids=token_ids,
            sampling=sampling,
            stop_token_ids=frozenset((*eos, *sampling.stop_token_ids)),
            cache_salt=self._salt,
        )
        self.engine.limits.check(request)
        completed = CompletedRequest(
            prompt=prompt if isinstance(prompt, str) else None,
            prompt_token_ids=token_ids,
            logprobs=[] if sampling.logprobs else None,
        )
        return _Job(request, completed, OutputText(tokenizer, sampling.stop) if tokenizer else None)

    def _run(self, jobs: list[_Job], show_progress: bool) -> list[CompletedRequest]:
        progress = self._progress if show_progress else NullProgress()
        waiting = iter(jobs)
        running: dict[str, _Job] = {}
        try:
            with progress.task("generating", total=len(jobs)) as task:
                self._feed(waiting, running)
                while running:
                    for output in self.engine.step():
                        job = running[output.request_id]
                        if job.take(output):
                            self.engine.cancel(output.request_id)  # a stop string; it may have ended by itself too
                        if job.completed.finish_reason is not None:
                            del running[output.request_id]
                            task.advance()
                    self._feed(waiting, running)
        finally:
            for request_id in running:  # an interrupted batch leaves nothing behind
                self.engine.cancel(request_id)
            self.engine.drain()
        return [job.completed for job in jobs]

    def _feed(self, waiting: Any, running: dict[str, _Job]) -> None:
        """Keeps the engine's queue filled without overflowing it."""
        while self.engine.scheduler.num_waiting < self.engine.limits.max_waiting:
            job = next(waiting, None)
            if job is None:
                return
            running[job.request.request_id] = job
            self.engine.add(job.request)

    def _require_tokenizer(self, what: str) -> Tokenizer:
        if self.tokenizer is None:
            raise InvalidRequestError(f"{what} needs the tokenizer, which skip_tokenizer=True left out; pass token ids")
        return self.tokenizer


@dataclass
class _Job:
    request: Request
    completed: CompletedRequest
    text: OutputText | None

    def take(self, output: RequestOutput) -> bool:
        """Adds new tokens. True when a stop string ended the text before the engine ended the request."""
        completed = self.completed
        num_new = len(output.token_ids)
        if self.text is not None:
            before = self.text.num_tokens
            self.text.push(output.token_ids)
            num_new = self.text.num_tokens - before  # none after the one that completed a stop string
        completed.token_ids += output.token_ids[:num_new]
        completed.finish_reason = output.finish_reason
        completed.cached_tokens = output.cached_tokens
        if completed.logprobs is not None:
            completed.logprobs += output.logprobs[:num_new]
        if self.text is None:
            return False
        stopped = self.text.stopped and output.finish_reason is None
        if self.text.stopped:
            completed.finish_reason = "stop"
        if completed.finish_reason is not None:
            self.text.finish()
            completed.text = self.text.text
        return stopped


def _is_token(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _is_tokens(value: object) -> bool:
    if isinstance(value, bytes | bytearray):
        return False
    return isinstance(value, Sequence | np.ndarray) and all(_is_token(token) for token in value)


_SECTIONS = ("model", "kv", "engine", "mesh", "queue")


def _config(model: str, settings: Mapping[str, object]) -> Config:
    if model.endswith(".py"):
        return from_keywords(load_config(model), _SECTIONS, **settings)
    return from_keywords(Config(), _SECTIONS, name=model, **settings)


def _params_for(params: SamplingParams | Sequence[SamplingParams] | None, num_prompts: int) -> list[SamplingParams]:
    if params is None:
        params = SamplingParams()
    if isinstance(params, SamplingParams):
        return [params] * num_prompts
    if not isinstance(params, Sequence) or not all(isinstance(p, SamplingParams) for p in params):
        raise InvalidRequestError(f"sampling_params: expected SamplingParams or a list of them, got {params!r:.80}")
    if len(params) != num_prompts:
        raise InvalidRequestError(
            f"sampling_params: expected one for all prompts or one for each of {num_prompts}, got {len(params)}"
        )
    return list(params)


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)
