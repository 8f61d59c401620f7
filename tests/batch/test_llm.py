"""The offline API as a user meets it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from preble_jax import LLM, SamplingParams
from preble_jax.errors import CheckpointError, ConfigError, InvalidRequestError, NotFoundError, PromptTooLongError

GREEDY = SamplingParams(temperature=0.0, max_tokens=8)
TINY_FOLDER = Path(__file__).parent.parent / "goldens" / "tiny_llama3"


def test_chat_answers(smollm2: LLM):
    (output,) = smollm2.chat([{"role": "user", "content": "What is the capital of France?"}], GREEDY)
    assert output.text == "The capital of France is Paris."
    assert output.finish_reason == "stop"
    assert smollm2.tokenizer.decode(output.token_ids) == output.text
    assert output.prompt is None and output.logprobs is None


@pytest.mark.parametrize("messages", ["hello", None, 3, {"role": "user", "content": "hello"}, iter([])])
def test_chat_wants_a_list(smollm2: LLM, messages: object):
    with pytest.raises(InvalidRequestError, match="messages: expected a conversation, which is a list of messages"):
        smollm2.chat(messages, GREEDY)  # type: ignore[arg-type]


def test_prompts_of_every_kind(smollm2: LLM):
    text = "The quick brown fox"
    ids = smollm2.tokenizer.encode(text)
    outputs = smollm2.generate([text, ids], GREEDY)
    assert outputs[0].token_ids == outputs[1].token_ids
    assert outputs[0].prompt == text and outputs[1].prompt is None
    assert outputs[0].prompt_token_ids == outputs[1].prompt_token_ids == ids
    assert [o.token_ids for o in smollm2.generate(text, GREEDY)] == [outputs[0].token_ids]
    assert [o.token_ids for o in smollm2.generate(ids, GREEDY)] == [outputs[0].token_ids]
    assert smollm2.generate([], GREEDY) == []


def test_stop_strings_end_the_text_and_the_request(smollm2: LLM):
    sampling = SamplingParams(temperature=0.0, max_tokens=60)
    (whole,) = smollm2.generate("1, 2, 3, 4,", sampling)
    stop = whole.text[10:14]
    (cut,) = smollm2.generate("1, 2, 3, 4,", SamplingParams(temperature=0.0, max_tokens=60, stop=stop))
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.finish_reason == "stop"
    assert len(cut.token_ids) < len(whole.token_ids)
    smollm2.engine.scheduler.validate()
    assert not smollm2.engine.has_work


def test_one_params_a_prompt_and_stop_tokens(tiny: LLM):
    prompt = [5, 6, 7]
    (plain,) = tiny.generate([prompt], SamplingParams(temperature=0.0, max_tokens=8))
    stop = plain.token_ids[3]
    params = [SamplingParams(temperature=0.0, max_tokens=n, stop_token_ids=s) for n, s in ((2, ()), (8, [stop]))]
    short, stopped = tiny.generate([prompt, prompt], params)
    assert (short.token_ids, short.finish_reason) == (plain.token_ids[:2], "length")
    assert (stopped.token_ids, stopped.finish_reason) == (plain.token_ids[: plain.token_ids.index(stop) + 1], "stop")


def test_a_seed_repeats_and_its_absence_does_not(tiny: LLM):
    seeded = SamplingParams(temperature=1.5, max_tokens=30, seed=3)
    free = SamplingParams(temperature=1.5, max_tokens=30)
    (a,), (b,) = tiny.generate([[1, 2]], seeded), tiny.generate([[1, 2]], seeded)
    assert a.token_ids == b.token_ids
    (c,), (d,) = tiny.generate([[1, 2]], free), tiny.generate([[1, 2]], free)
    assert c.token_ids != d.token_ids


def test_the_context_ends_a_request(tiny: LLM):
    limit = tiny.engine.limits.max_model_len
    (output,) = tiny.generate([[1] * (limit - 3)], SamplingParams(temperature=0.0, max_tokens=100))
    assert (len(output.token_ids), output.finish_reason) == (3, "length")


@pytest.mark.parametrize(
    ("prompts", "error", "words"),
    [
        ([[]], InvalidRequestError, "at least one token"),
        ([[1, 2], [999]], InvalidRequestError, r"\[0, 255\], got 999"),
        ([[1, -2]], InvalidRequestError, "got -2"),
        ([[1] * 5000], PromptTooLongError, "got 5000"),
        (["text"], InvalidRequestError, "a text prompt needs the tokenizer"),
        ([[1], None], InvalidRequestError, "prompt 1: expected text or a list of token ids, got None"),
        ([[1.5]], InvalidRequestError, "prompt 0"),
        (None, InvalidRequestError, "prompts: expected text, token ids, or a list of either, got None"),
        (b"bytes", InvalidRequestError, "prompts: expected text"),
        ([b"bytes"], InvalidRequestError, "prompt 0"),
        ({1: 2}, InvalidRequestError, "prompts: expected text"),
    ],
)
def test_a_bad_prompt_is_refused_and_nothing_runs(tiny: LLM, prompts, error, words):
    steps = tiny.engine.ledger.steps
    with pytest.raises(error, match=words):
        tiny.generate(prompts, GREEDY)
    assert tiny.engine.ledger.steps == steps and not tiny.engine.has_work


def test_an_interrupted_batch_leaves_nothing_behind(tiny: LLM, monkeypatch: pytest.MonkeyPatch):
    step = tiny.engine.step
    calls = iter([step, step])

    def interrupted():
        run = next(calls, None)
        if run is None:
            raise KeyboardInterrupt
        return run()

    monkeypatch.setattr(tiny.engine, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tiny.generate([[1] * 30, [2] * 30], SamplingParams(temperature=0.0, max_tokens=50))
    monkeypatch.undo()
    tiny.engine.scheduler.validate()
    assert not tiny.engine.has_work
    assert len(tiny.generate([[1] * 30], GREEDY)[0].token_ids) == 8


def test_numpy_tuples_and_lists_are_the_same_prompt(tiny: LLM):
    prompt = [5, 6, 7]
    expected = tiny.generate([prompt], GREEDY)[0].token_ids
    for prompts in (np.array(prompt), [np.array(prompt)], [tuple(prompt)], tuple(prompt), np.array([prompt])):
        assert [output.token_ids for output in tiny.generate(prompts, GREEDY)] == [expected]


def test_wrong_numbers_of_params(tiny: LLM):
    with pytest.raises(InvalidRequestError, match="one for each of 2, got 1"):
        tiny.generate([[1], [2]], [GREEDY])
    with pytest.raises(InvalidRequestError, match=r"expected SamplingParams or a list of them, got 0\.5"):
        tiny.generate([[1]], 0.5)


def test_bad_models_and_settings_are_named():
    with pytest.raises(NotFoundError, match="smollm2-135m-instruct"):
        LLM("no-such-model")
    with pytest.raises(ConfigError, match="page_size"):
        LLM(str(TINY_FOLDER), skip_tokenizer=True, pagesize=32)
    with pytest.raises(ConfigError, match="groups: no such setting"):
        LLM(str(TINY_FOLDER), skip_tokenizer=True, groups=3)
    with pytest.raises(ConfigError, match=r"mesh\.tensor: expected 1 to \d+"):
        LLM(str(TINY_FOLDER), skip_tokenizer=True, tensor=64)
    with pytest.raises(ConfigError, match="attention"):
        LLM(str(TINY_FOLDER), skip_tokenizer=True, attention="cuda", num_pages=8, dtype="float32")
    with pytest.raises(CheckpointError, match="tokenizer"):
        LLM(str(TINY_FOLDER))


def test_control_tokens_count_in_a_text_and_not_in_a_message(smollm2: LLM):
    end = "<|im_end|>"
    (text,) = smollm2.generate(end, GREEDY)
    assert text.prompt_token_ids == [2]
    (chat,) = smollm2.chat([{"role": "user", "content": end}], GREEDY)
    (plain,) = smollm2.chat([{"role": "user", "content": "x"}], GREEDY)
    assert chat.prompt_token_ids.count(2) == plain.prompt_token_ids.count(2)
