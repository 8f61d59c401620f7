"""The public service, end to end over loopback: what a client sends and what it gets."""

from __future__ import annotations

import asyncio
import math
from contextlib import aclosing
from typing import Any

import grpc
import pytest

from fakes.deployment import Deployment, until
from fakes.tokenizer import byte_tokenizer
from preble_jax.errors import (
    DeadlineError,
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
    PrebleError,
    PromptTooLongError,
)
from preble_jax.kv.hashing import block_hashes, cache_salt
from preble_jax.model.tokenizer import Tokenizer
from preble_jax.sampling_params import SamplingParams
from serve.client import Client
from serve.protos.preble.v1 import inference_pb2 as pb
from serve.protos.preble.v1 import inference_pb2_grpc, sampling_pb2
from serve.transport import open_channel

PROMPT = "the quick brown fox"
GREEDY = SamplingParams(max_tokens=9, temperature=0.0)


async def test_tokens_arrive_one_by_one_and_the_last_message_has_the_usage(deployment: Deployment) -> None:
    chunks = [chunk async for chunk in deployment.client.stream(PROMPT, GREEDY)]
    assert [chunk.text for chunk in chunks] == list("the quick")
    assert [chunk.finish_reason for chunk in chunks] == [None] * 8 + ["length"]
    usage = chunks[-1].usage
    assert usage is not None
    assert (usage.prompt_tokens, usage.cached_tokens, usage.output_tokens) == (19, 0, 9)
    assert usage.group in deployment.engines


async def test_the_first_token_does_not_wait_for_the_last(deployment: Deployment) -> None:
    for engine in deployment.engines.values():
        engine.hold_after = 1
    async with aclosing(deployment.client.stream(PROMPT, GREEDY)) as stream:
        first = await anext(stream)
        assert first.text == "t"
        assert deployment.running
        for engine in deployment.engines.values():
            engine.resume()
        assert "".join([chunk.text async for chunk in stream]) == "he quick"


async def test_text_tokens_and_chat_are_three_ways_to_say_a_prompt(deployment: Deployment) -> None:
    token_ids = byte_tokenizer().encode(PROMPT)
    assert (await deployment.client.generate(token_ids, GREEDY)).text == "the quick"
    chat = await deployment.client.generate([{"role": "user", "content": "hi"}], GREEDY)
    assert chat.text == "user\nhi"  # the fake echoes the prompt; the template's control tokens are no text
    assert chat.token_ids[0] == 256


async def test_an_end_of_sequence_token_ends_the_answer_unless_ignored(deployment: Deployment) -> None:
    tokenizer = byte_tokenizer()
    prompt = [*tokenizer.encode("ab"), 257, *tokenizer.encode("cd")]
    stopped = await deployment.client.generate(prompt, SamplingParams(max_tokens=5))
    assert (stopped.text, stopped.finish_reason) == ("ab", "stop")
    ignored = await deployment.client.generate(prompt, SamplingParams(max_tokens=5, ignore_eos=True))
    assert (ignored.text, ignored.finish_reason) == ("abcd", "length")


async def test_a_stop_string_ends_the_answer_and_frees_the_group(deployment: Deployment) -> None:
    sampling = SamplingParams(max_tokens=400, stop=["ck b"])
    answer = await deployment.client.generate(PROMPT, sampling)
    assert answer.text == "the qui"
    assert answer.finish_reason == "stop"
    assert answer.usage.output_tokens == len(answer.token_ids) == len("the quick b")
    await until(lambda: not deployment.running)
    assert sum(len(engine.cancelled) for engine in deployment.engines.values()) == 1


async def test_half_a_character_is_never_shown(deployment: Deployment) -> None:
    chunks = [chunk.text async for chunk in deployment.client.stream("é☃🦊", GREEDY)]
    assert "".join(chunks) == "é☃🦊"
    assert [text for text in chunks if text] == ["é", "☃", "🦊"]


async def test_logprobs_come_with_their_tokens(deployment: Deployment) -> None:
    answer = await deployment.client.generate(PROMPT, SamplingParams(max_tokens=3, logprobs=True))
    assert answer.logprobs == (-0.5, -0.5, -0.5)
    assert (await deployment.client.generate(PROMPT, GREEDY)).logprobs == ()


async def test_a_repeated_prompt_is_sent_to_where_its_pages_are(deployment: Deployment) -> None:
    answers = [await deployment.client.generate(PROMPT, GREEDY) for _ in range(4)]
    assert len({answer.usage.group for answer in answers}) == 1
    assert [answer.usage.cached_tokens for answer in answers] == [0, 16, 16, 16]


async def test_frontend_and_group_hash_with_the_same_salt(deployment: Deployment) -> None:
    """The scheduler's forest is fed by the group's hashes and asked with the frontend's."""
    answer = await deployment.client.generate(PROMPT, GREEDY, cache_salt=b"mine")
    expected = block_hashes(byte_tokenizer().encode(PROMPT), 4, cache_salt("fake", b"mine"))
    snapshot = await deployment.engines[answer.usage.group].snapshot()
    assert [block for chain in snapshot.stored for block in chain.hashes] == expected
    other = await deployment.client.generate(PROMPT, GREEDY, cache_salt=b"yours")
    assert other.usage.cached_tokens == 0


async def test_cancelling_a_stream_cancels_at_the_engine_and_at_the_scheduler(deployment: Deployment) -> None:
    for engine in deployment.engines.values():
        engine.hold_after = 2
    async with aclosing(deployment.client.stream(PROMPT, GREEDY)) as stream:
        await anext(stream)
        assert len(deployment.running) == 1
    await until(lambda: not deployment.running)
    await deployment.until_state(lambda groups: all(group.num_outstanding == 0 for group in groups.values()))


async def test_cancelling_before_the_first_token(deployment: Deployment) -> None:
    for engine in deployment.engines.values():
        engine.hold_after = 0
    waiting = asyncio.create_task(deployment.client.generate(PROMPT, GREEDY))
    await until(lambda: len(deployment.running) == 1)
    waiting.cancel()
    await until(lambda: not deployment.running)
    await deployment.until_state(lambda groups: all(group.num_outstanding == 0 for group in groups.values()))


async def test_the_deadline_travels_to_the_engine_and_ends_the_request(deployment: Deployment) -> None:
    for engine in deployment.engines.values():
        engine.hold_after = 2
    answer = asyncio.create_task(deployment.client.generate(PROMPT, GREEDY, timeout_s=0.3))
    await until(lambda: len(deployment.running) == 1)
    [request] = [request for engine in deployment.engines.values() for request in engine.running.values()]
    assert request.deadline_s is not None
    assert 0 < request.deadline_s - asyncio.get_running_loop().time() <= 0.3
    with pytest.raises(DeadlineError):
        await answer
    await until(lambda: not deployment.running)


async def test_overload_is_an_answer_with_a_hint(deployment: Deployment) -> None:
    for engine in deployment.engines.values():
        engine.fail = OverloadedError("the queue is full", retry_after_s=2.5)
    with pytest.raises(OverloadedError, match="queue is full") as caught:
        await deployment.client.generate(PROMPT, GREEDY)
    assert caught.value.retry_after_s == 2.5


BAD_REQUESTS = {
    "no prompt": (pb.GenerateRequest(), "INVALID_ARGUMENT", "got none"),
    "empty text": (pb.GenerateRequest(text=""), "INVALID_ARGUMENT", "empty prompt"),
    "empty tokens": (pb.GenerateRequest(token_ids=pb.TokenIds()), "INVALID_ARGUMENT", "empty prompt"),
    "empty chat": (pb.GenerateRequest(chat=pb.Chat()), "INVALID_ARGUMENT", "messages"),
    "token too large": (pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1, 258])), "INVALID_ARGUMENT", "got 258"),
    "token negative": (pb.GenerateRequest(token_ids=pb.TokenIds(ids=[-1])), "INVALID_ARGUMENT", "got -1"),
    "too long": (pb.GenerateRequest(text="x" * 512), "INVALID_ARGUMENT", "at most 511 tokens"),
    "unknown model": (pb.GenerateRequest(text="x", model="gpt"), "NOT_FOUND", "'fake'"),
    "negative temperature": (
        pb.GenerateRequest(text="x", sampling=sampling_pb2.SamplingParams(temperature=-1.0)),
        "INVALID_ARGUMENT",
        "temperature",
    ),
    "NaN temperature": (
        pb.GenerateRequest(text="x", sampling=sampling_pb2.SamplingParams(temperature=math.nan)),
        "INVALID_ARGUMENT",
        "temperature",
    ),
    "no tokens wanted": (
        pb.GenerateRequest(text="x", sampling=sampling_pb2.SamplingParams(max_tokens=0)),
        "INVALID_ARGUMENT",
        "max_tokens",
    ),
}


@pytest.mark.parametrize("name", BAD_REQUESTS)
async def test_bad_input_is_refused_before_it_costs_anything(deployment: Deployment, name: str) -> None:
    request, status, words = BAD_REQUESTS[name]
    async with open_channel(deployment.frontend.address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in inference_pb2_grpc.InferenceStub(channel).Generate(request):
                pass
    assert caught.value.code().name == status
    assert words in caught.value.details()
    assert sum(engine.num_requests for engine in deployment.engines.values()) == 0


async def test_errors_reach_the_client_as_what_they_are(deployment: Deployment) -> None:
    for prompt, error in (("", InvalidRequestError), ("x" * 600, PromptTooLongError)):
        with pytest.raises(error):
            await deployment.client.generate(prompt, GREEDY)
    with pytest.raises(NotFoundError):
        async with open_channel(deployment.frontend.address) as channel:
            await _first(inference_pb2_grpc.InferenceStub(channel), pb.GenerateRequest(text="x", model="other"))
    for engine in deployment.engines.values():
        engine.fail = ZeroDivisionError("a bug")
    with pytest.raises(PrebleError, match="ZeroDivisionError"):
        await deployment.client.generate(PROMPT, GREEDY)


async def _first(stub: inference_pb2_grpc.InferenceStub, request: pb.GenerateRequest) -> pb.GenerateResponse:
    from serve.status import transport_errors

    with transport_errors():
        async for response in stub.Generate(request):
            return response
    raise AssertionError("no response")


async def test_equal_ids_of_two_clients_do_not_mix(deployment: Deployment) -> None:
    async with open_channel(deployment.frontend.address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        requests = [pb.GenerateRequest(text=text, request_id="same") for text in ("aaaa", "bbbb")]
        both = await asyncio.gather(*(_first(stub, request) for request in requests))
    assert [(response.request_id, response.text) for response in both] == [("same", "a"), ("same", "b")]


async def test_the_sync_client(deployment: Deployment) -> None:
    def talk() -> tuple[str, str]:
        with Client(deployment.frontend.address) as client:
            for chunk in client.stream(PROMPT, GREEDY):
                first = chunk.text
                break  # leaving early cancels
            return first, client.generate(PROMPT, GREEDY).text

    assert await asyncio.to_thread(talk) == ("t", "the quick")
    await until(lambda: not deployment.running)


async def test_a_prompt_that_is_no_prompt_is_refused_by_the_client(deployment: Deployment) -> None:
    for prompt in ([1, "two"], [{"role": "user", "body": "x"}], [1 << 40]):
        with pytest.raises(InvalidRequestError, match="prompt"):
            await deployment.client.generate(prompt, GREEDY)


async def test_a_text_that_can_never_fit_is_refused_before_it_is_tokenised(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tokenizer, "encode", lambda *_, **__: pytest.fail("tokenised"))
    for prompt in ("x" * 100_000, [{"role": "user", "content": "x" * 50_000}] * 2):
        with pytest.raises(PromptTooLongError, match="got 100000"):
            await deployment.client.generate(prompt, GREEDY)


async def test_control_tokens_count_in_a_text_and_not_in_a_message(deployment: Deployment) -> None:
    start = "<|im_start|>"
    text = await deployment.client.generate(start, GREEDY)
    chat = await deployment.client.generate([{"role": "user", "content": start}], GREEDY)
    plain = await deployment.client.generate([{"role": "user", "content": "x" * len(start)}], GREEDY)
    assert text.usage.prompt_tokens == 1
    assert chat.usage.prompt_tokens == plain.usage.prompt_tokens


@pytest.mark.parametrize("prompt", [None, 3, "\ud800", [1 << 40], [{"role": "user"}, 3], [{"rôle": "user"}]], ids=repr)
async def test_a_prompt_the_client_cannot_send_is_a_clear_error(deployment: Deployment, prompt: Any) -> None:
    with pytest.raises(InvalidRequestError, match="prompt: expected"):
        await deployment.client.generate(prompt, GREEDY)
