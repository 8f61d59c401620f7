"""Python clients of a deployment: `Client` for scripts, `AsyncClient` for many requests at a time.

    with Client("127.0.0.1:50050") as client:
        print(client.generate("The capital of France is", SamplingParams(max_tokens=8, temperature=0.0)).text)
        for chunk in client.stream([{"role": "user", "content": "Name three rivers."}]):
            print(chunk.text, end="", flush=True)

A prompt is text, a list of token ids, or a list of chat messages. Errors are those of `preble_jax.errors`. Leaving a
stream early cancels the request.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict, Unpack

from preble_jax.errors import GroupUnavailableError, InvalidRequestError
from preble_jax.request import FinishReason
from preble_jax.sampling_params import SamplingParams
from serve import wire
from serve.protos.preble.v1 import inference_pb2 as pb
from serve.protos.preble.v1 import inference_pb2_grpc
from serve.status import transport_errors
from serve.transport import open_channel, open_sync_channel

PromptInput = str | Sequence[int] | Sequence[Mapping[str, str]]


@dataclass(frozen=True, kw_only=True)
class Usage:
    """cached_tokens: prompt tokens the device group did not have to compute. group: the one that answered."""

    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    group: str


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """What is new. finish_reason and usage come with the last one."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason | None
    usage: Usage | None


@dataclass(frozen=True, kw_only=True)
class Completion:
    """A whole answer."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason
    usage: Usage


class CallOptions(TypedDict, total=False):
    """timeout_s: the request's deadline. tenant: who pays. cache_salt: shares cached pages only with its equals."""

    timeout_s: float | None
    tenant: str
    cache_salt: bytes


class Client:
    """address: host:port of a frontend. Connects when first used."""

    def __init__(self, address: str) -> None:
        self._channel = open_sync_channel(address)
        self._stub = inference_pb2_grpc.InferenceStub(self._channel)

    def stream(
        self, prompt: PromptInput, sampling: SamplingParams | None = None, **options: Unpack[CallOptions]
    ) -> Generator[Chunk, None, None]:
        """The answer as it is made."""
        with transport_errors():
            call = self._stub.Generate(_request(prompt, sampling, options), timeout=options.get("timeout_s"))
            try:
                for response in call:
                    yield _chunk(response)
            finally:
                call.cancel()

    def generate(
        self, prompt: PromptInput, sampling: SamplingParams | None = None, **options: Unpack[CallOptions]
    ) -> Completion:
        """The answer when it is complete."""
        return _complete(list(self.stream(prompt, sampling, **options)))

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AsyncClient:
    """`Client` for asyncio. address: host:port of a frontend. Must be made inside a running event loop."""

    def __init__(self, address: str) -> None:
        self._channel = open_channel(address)
        self._stub = inference_pb2_grpc.InferenceStub(self._channel)

    async def stream(
        self, prompt: PromptInput, sampling: SamplingParams | None = None, **options: Unpack[CallOptions]
    ) -> AsyncGenerator[Chunk, None]:
        """The answer as it is made. Close it (`contextlib.aclosing`) to cancel at once."""
        call = self._stub.Generate(_request(prompt, sampling, options), timeout=options.get("timeout_s"))
        try:
            with transport_errors():
                async for response in call:
                    yield _chunk(response)
        finally:
            call.cancel()

    async def generate(
        self, prompt: PromptInput, sampling: SamplingParams | None = None, **options: Unpack[CallOptions]
    ) -> Completion:
        """The answer when it is complete."""
        return _complete([chunk async for chunk in self.stream(prompt, sampling, **options)])

    async def close(self) -> None:
        await self._channel.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


def _request(prompt: PromptInput, sampling: SamplingParams | None, options: CallOptions) -> pb.GenerateRequest:
    try:
        return pb.GenerateRequest(
            sampling=None if sampling is None else wire.sampling_to_proto(sampling),
            tenant=options.get("tenant", ""),
            cache_salt=options.get("cache_salt", b""),
            **_prompt_field(prompt),
        )
    except (TypeError, ValueError) as error:  # half a surrogate pair is one of them
        raise InvalidRequestError(
            f"prompt: expected text, a list of token ids, or a list of messages with role and content ({error})"
        ) from error


def _prompt_field(prompt: PromptInput) -> dict[str, Any]:
    if isinstance(prompt, str):
        return {"text": prompt}
    items: list[Any] = list(prompt)
    if items and all(isinstance(item, Mapping) for item in items):
        return {"chat": pb.Chat(messages=[pb.ChatMessage(**item) for item in items])}
    return {"token_ids": pb.TokenIds(ids=items)}


def _chunk(response: pb.GenerateResponse) -> Chunk:
    usage = response.usage
    return Chunk(
        text=response.text,
        token_ids=tuple(response.token_ids),
        logprobs=tuple(response.logprobs),
        finish_reason=wire.finish_reason_from_proto(response.finish_reason),
        usage=Usage(
            prompt_tokens=usage.prompt_tokens,
            cached_tokens=usage.cached_tokens,
            output_tokens=usage.output_tokens,
            group=usage.group,
        )
        if response.HasField("usage")
        else None,
    )


def _complete(chunks: Sequence[Chunk]) -> Completion:
    last = chunks[-1] if chunks else None
    if last is None or last.finish_reason is None or last.usage is None:
        raise GroupUnavailableError("expected a stream that ends with a finish reason, got one that broke off")
    return Completion(
        text="".join(chunk.text for chunk in chunks),
        token_ids=tuple(token for chunk in chunks for token in chunk.token_ids),
        logprobs=tuple(value for chunk in chunks for value in chunk.logprobs),
        finish_reason=last.finish_reason,
        usage=last.usage,
    )
