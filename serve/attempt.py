"""One try at serving a request: a stream from one device group, its tokens made text."""

from __future__ import annotations

from collections.abc import AsyncGenerator

import grpc

from preble_jax.errors import CancelledError, GroupUnavailableError
from preble_jax.model.text import OutputText
from preble_jax.model.tokenizer import Tokenizer
from preble_jax.request import FinishReason
from serve import wire
from serve.prompts import Prompt
from serve.protos.preble.v1 import inference_pb2 as pb
from serve.protos.preble.v1 import worker_pb2, worker_pb2_grpc
from serve.router import Route
from serve.status import transport_errors


class Attempt:
    """output_tokens, cached_tokens, queue_s, finish_reason: how far it got; kept up to date while it runs."""

    def __init__(self, prompt: Prompt, route: Route, tokenizer: Tokenizer) -> None:
        self._prompt = prompt
        self._route = route
        self._text = OutputText(tokenizer, prompt.sampling.stop)
        self.output_tokens = 0
        self.cached_tokens = 0
        self.queue_s: float | None = None
        self.finish_reason: FinishReason | None = None

    @property
    def in_vain(self) -> bool:
        """Nothing came of it."""
        return self.finish_reason is None and self.output_tokens == 0

    async def run(
        self, channel: grpc.aio.Channel, timeout_s: float | None
    ) -> AsyncGenerator[pb.GenerateResponse, None]:
        """Leaving it early, for whatever reason, cancels the request at the device group.

        timeout_s: what is left of the client's deadline.
        Raises `GroupUnavailableError` when the group is gone or drains, and whatever else the group raised.
        """
        request = self._prompt.worker_request(self._route.attempt_id)
        call = worker_pb2_grpc.WorkerStub(channel).Generate(request, timeout=timeout_s)
        try:
            with transport_errors():
                async for output in call:
                    yield self._respond(output)
                    if self.finish_reason is not None:
                        return
            raise GroupUnavailableError("the stream ended before the request was finished")
        except CancelledError as error:  # by the worker, which is shutting down; ours would be asyncio's
            raise GroupUnavailableError(f"the device group shut down ({error})") from error
        finally:
            call.cancel()

    def _respond(self, output: worker_pb2.WorkerGenerateResponse) -> pb.GenerateResponse:
        delta = self._text.push(output.token_ids)
        num_new = self._text.num_tokens - self.output_tokens  # none after the one that completed a stop string
        self.output_tokens += num_new
        self.cached_tokens = output.cached_tokens
        if output.HasField("queue_s"):
            self.queue_s = output.queue_s
        self.finish_reason = wire.finish_reason_from_proto(output.finish_reason)
        if self.finish_reason is not None:
            delta += self._text.finish()
        if self._text.stopped:
            self.finish_reason = "stop"
        return pb.GenerateResponse(
            text=delta,
            token_ids=output.token_ids[:num_new],
            logprobs=output.logprobs[:num_new],
            finish_reason=wire.finish_reason_to_proto(self.finish_reason),
            usage=None if self.finish_reason is None else self._usage(),
        )

    def _usage(self) -> pb.Usage:
        return pb.Usage(
            prompt_tokens=len(self._prompt.token_ids),
            cached_tokens=self.cached_tokens,
            output_tokens=self.output_tokens,
            group=self._route.group,
        )
