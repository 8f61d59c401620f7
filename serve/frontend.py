"""A frontend's process: the public gRPC service. Text becomes tokens here and tokens become text. Never imports JAX.

Any number of frontends may serve one deployment; they share nothing.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import aclosing
from functools import partial
from pathlib import Path
from uuid import uuid4

import grpc

from preble_jax.config import Config
from preble_jax.errors import GroupUnavailableError
from preble_jax.model.tokenizer import Tokenizer
from serve.attempt import Attempt
from serve.channels import Channels
from serve.prompts import PromptReader
from serve.protos.preble.v1 import inference_pb2 as pb
from serve.protos.preble.v1 import inference_pb2_grpc, scheduler_pb2
from serve.router import Router
from serve.status import answers_errors
from serve.transport import Server, announce, stop_event

SERVICE = pb.DESCRIPTOR.services_by_name["Inference"].full_name
STOP_GRACE_S = 1.0

log = logging.getLogger(__name__)


class InferenceServicer(inference_pb2_grpc.InferenceServicer):
    def __init__(self, router: Router, tokenizer: Tokenizer, model: str, page_size: int) -> None:
        self._router = router
        self._tokenizer = tokenizer
        self._reader = PromptReader(tokenizer, model, page_size)
        self._channels = Channels(lambda: [hello.group.address for hello in router.groups.values()])

    async def close(self) -> None:
        await self._channels.close()

    @answers_errors
    async def Generate(
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.GenerateResponse]:
        # In a thread: a long prompt takes the tokenizer milliseconds in which other streams would stand still.
        prompt = await asyncio.to_thread(self._reader.read, request, self._router.max_model_len)
        request_id = request.request_id or uuid4().hex
        failed: list[scheduler_pb2.GroupProcess] = []
        while True:
            # Ids of our own, a new one each attempt: clients may choose equal ones, and a late report must not mix in.
            route = await self._router.place(prompt.place_request(uuid4().hex, failed))
            attempt, begun = Attempt(prompt, route, self._tokenizer), False
            try:
                async with (
                    self._channels.use(route.address) as channel,
                    aclosing(attempt.run(channel, context.time_remaining())) as responses,
                ):
                    async for response in responses:
                        response.request_id = request_id
                        if not begun:
                            begun = True
                            self._router.first_token(route, attempt.queue_s)
                        yield response
                return
            except GroupUnavailableError as error:
                if attempt.output_tokens:
                    raise GroupUnavailableError(
                        f"device group {route.group} failed after {attempt.output_tokens} tokens ({error}); "
                        "send the request again"
                    ) from error
                log.warning("request %s: group %s failed before its first token: %s", request_id, route.group, error)
                failed.append(route.process)
            finally:
                self._router.finished(route, attempt.output_tokens, attempt.cached_tokens, failed=attempt.in_vain)


class Frontend:
    """Server and router as a context: inside it serves, and reports healthy while a device group is known."""

    def __init__(self, tokenizer: Tokenizer, config: Config, scheduler_address: str, port: int) -> None:
        self._settings, self._port = config.serve, port
        self._router = Router(scheduler_address)
        self._servicer = InferenceServicer(self._router, tokenizer, config.model.name, config.kv.page_size)
        self._server = Server([SERVICE], [partial(inference_pb2_grpc.add_InferenceServicer_to_server, self._servicer)])

    @property
    def address(self) -> str:
        return self._server.address

    async def __aenter__(self) -> Frontend:
        await self._server.start(self._settings.host, self._port, "serve.frontend_port")
        self._router.on_availability = self._server.set_serving
        await self._router.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._router.on_availability = None
        await self._server.stop(STOP_GRACE_S)
        await self._router.__aexit__()
        await self._servicer.close()


async def run_frontend(
    tokenizer: Tokenizer, config: Config, scheduler_address: str, port: int, address_file: Path | None = None
) -> None:
    """Serves until SIGTERM or SIGINT. Raises `ConfigError` when the port is taken."""
    stop = stop_event()
    async with Frontend(tokenizer, config, scheduler_address, port) as frontend:
        announce(frontend.address, address_file)
        await stop.wait()
