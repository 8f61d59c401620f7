"""From what a client sent to what a device group computes: checks, chat template, tokens, page hashes. No JAX."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from preble_jax.errors import InvalidRequestError, NotFoundError, PromptTooLongError
from preble_jax.kv.hashing import block_hashes, cache_salt
from preble_jax.model.chat import encode_chat
from preble_jax.model.tokenizer import Tokenizer
from preble_jax.sampling_params import SamplingParams
from serve import wire
from serve.protos.preble.v1 import inference_pb2 as pb
from serve.protos.preble.v1 import scheduler_pb2, worker_pb2


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A request that passed all checks. stop_token_ids: every id that ends it, end-of-sequence ids included."""

    token_ids: Sequence[int]
    block_hashes: Sequence[bytes]
    sampling: SamplingParams
    stop_token_ids: Sequence[int]
    tenant: str
    cache_salt: bytes

    def place_request(
        self, attempt_id: str, excluded: Sequence[scheduler_pb2.GroupProcess]
    ) -> scheduler_pb2.PlaceRequest:
        return scheduler_pb2.PlaceRequest(
            request_id=attempt_id,
            block_hashes=wire.hashes_to_bytes(self.block_hashes),
            num_tokens=len(self.token_ids),
            max_tokens=self.sampling.max_tokens,
            tenant=self.tenant,
            excluded=excluded,
        )

    def worker_request(self, attempt_id: str) -> worker_pb2.WorkerGenerateRequest:
        return worker_pb2.WorkerGenerateRequest(
            request_id=attempt_id,
            prompt_token_ids=self.token_ids,
            sampling=wire.sampling_to_proto(self.sampling),
            stop_token_ids=self.stop_token_ids,
            tenant=self.tenant,
            cache_salt=self.cache_salt,
        )


class PromptReader:
    """Reads requests for one model. Safe to use from several threads.

    model: the name clients may ask for. page_size: of the deployment's device groups.
    """

    def __init__(self, tokenizer: Tokenizer, model: str, page_size: int) -> None:
        self._tokenizer = tokenizer
        self._model = model
        self._page_size = page_size

    def read(self, request: pb.GenerateRequest, max_model_len: int | None = None) -> Prompt:
        """Raises `InvalidRequestError`, `PromptTooLongError`, or `NotFoundError` for another model.

        max_model_len: None when no group has said yet; the group itself checks again.
        """
        if request.model not in ("", self._model):
            raise NotFoundError(f"model: expected {self._model!r}, the one that is served here, got {request.model!r}")
        sampling = wire.sampling_from_proto(request.sampling)
        self._check_text(request, max_model_len)
        token_ids = self._token_ids(request)
        self._check(token_ids, max_model_len)
        salt = cache_salt(self._model, request.cache_salt)
        ends = () if sampling.ignore_eos else self._tokenizer.eos_token_ids
        return Prompt(
            token_ids=token_ids,
            block_hashes=block_hashes(token_ids, self._page_size, salt),
            sampling=sampling,
            stop_token_ids=sorted({*ends, *sampling.stop_token_ids}),
            tenant=request.tenant or wire.DEFAULT_TENANT,
            cache_salt=salt,
        )

    def _check_text(self, request: pb.GenerateRequest, max_model_len: int | None) -> None:
        """Refuses text that cannot fit however well it compresses, before it keeps the tokenizer busy for seconds."""
        text = (request.text, *(message.content for message in request.chat.messages))
        num_bytes = sum(len(part.encode()) for part in text)
        longest = self._tokenizer.longest_token_bytes
        if max_model_len is not None and num_bytes > max_model_len * longest:
            raise PromptTooLongError(
                f"prompt: expected at most {max_model_len * longest} bytes of text ({max_model_len} tokens of context, "
                f"none longer than {longest} bytes), got {num_bytes}; shorten it"
            )

    def _token_ids(self, request: pb.GenerateRequest) -> Sequence[int]:
        kind = request.WhichOneof("prompt")
        if kind == "text":
            return self._tokenizer.encode(request.text, parse_special=True)  # the caller wrote all of it
        if kind == "token_ids":
            return list(request.token_ids.ids)
        if kind == "chat":
            messages = [{"role": message.role, "content": message.content} for message in request.chat.messages]
            return encode_chat(self._tokenizer, messages)
        raise InvalidRequestError("prompt: expected one of text, token_ids, chat, got none")

    def _check(self, token_ids: Sequence[int], max_model_len: int | None) -> None:
        if not token_ids:
            raise InvalidRequestError("prompt: expected at least one token, got an empty prompt")
        vocab_size = self._tokenizer.vocab_size
        if not 0 <= min(token_ids) <= max(token_ids) < vocab_size:
            outside = next(token for token in token_ids if not 0 <= token < vocab_size)
            raise InvalidRequestError(f"prompt: expected token ids in [0, {vocab_size}), got {outside}")
        if max_model_len is not None and len(token_ids) >= max_model_len:
            raise PromptTooLongError(
                f"prompt: expected at most {max_model_len - 1} tokens (the context of {max_model_len} less one for "
                f"output), got {len(token_ids)}; shorten it"
            )
