"""Streaming text equals whole text, for every split; nothing is shown that a stop string takes back."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fakes.tokenizer import byte_tokenizer
from preble_jax.model.text import OutputText
from preble_jax.model.tokenizer import Tokenizer

TOKENIZER = byte_tokenizer()
BYTE_ID = {TOKENIZER.token_bytes(i): i for i in range(256)}
END = 257


def ids_of(raw: bytes) -> list[int]:
    return [BYTE_ID[bytes([byte])] for byte in raw]


def cut_at_stop(text: str, stop: Sequence[str]) -> str:
    """The definition, by trying every end: the first place where a stop string is complete, the longest one there."""
    for end in range(1, len(text) + 1):
        starts = [end - len(s) for s in stop if text[:end].endswith(s)]
        if starts:
            return text[: min(starts)]
    return text


def stream(ids: Sequence[int], sizes: Sequence[int], stop: Sequence[str] = ()) -> tuple[OutputText, list[str]]:
    """Pushes the ids in pieces of these sizes (cycled), then finishes."""
    output, deltas, at, turn = OutputText(TOKENIZER, stop), [], 0, 0
    while at < len(ids):
        size = sizes[turn % len(sizes)]
        deltas.append(output.push(ids[at : at + size]))
        at, turn = at + size, turn + 1
    deltas.append(output.finish())
    return output, deltas


raw_bytes = st.one_of(
    st.binary(max_size=24),
    st.text("aé世🎉 ", max_size=12).map(str.encode),
    st.lists(st.sampled_from([b"\xf0\x9f", b"\x8e\x89", b"\xe4", b"\xb8\x96", b"a", b"\xff"])).map(b"".join),
)
sizes = st.lists(st.integers(1, 5), min_size=1, max_size=4)


@settings(max_examples=500, deadline=None)
@given(raw=raw_bytes, sizes=sizes)
def test_pieces_joined_are_the_whole_decoding(raw: bytes, sizes: list[int]) -> None:
    output, deltas = stream(ids_of(raw), sizes)
    assert "".join(deltas) == output.text == raw.decode("utf-8", "replace") == TOKENIZER.decode(ids_of(raw))
    assert output.num_tokens == len(raw)
    assert not output.stopped


def test_half_a_character_is_never_shown() -> None:
    output = OutputText(TOKENIZER)
    shown = [output.push([i]) for i in ids_of("né🎉世".encode())]
    assert shown == ["n", "", "é", "", "", "", "🎉", "", "", "世"]
    assert output.push(ids_of(b"\xe4\xb8")) == ""
    assert output.finish() == "\ufffd"


@settings(max_examples=1000, deadline=None)
@given(
    text=st.text("ab\né", max_size=16),
    stop=st.lists(st.text("ab\né", min_size=1, max_size=5), min_size=1, max_size=3),
    sizes=sizes,
)
@example(text="abababx", stop=["abx"], sizes=[1])
@example(text="aab", stop=["aabb", "ab"], sizes=[4])
def test_text_ends_before_the_first_stop_string(text: str, stop: list[str], sizes: list[int]) -> None:
    output, deltas = stream(ids_of(text.encode()), sizes, stop)
    expected = cut_at_stop(text, stop)
    assert "".join(deltas) == output.text == expected
    assert output.stopped == (expected != text)


@settings(max_examples=300, deadline=None)
@given(text=st.text("ab", max_size=12), stop=st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=2))
def test_only_what_may_still_be_taken_back_is_held(text: str, stop: list[str]) -> None:
    """After each token: what was shown plus a beginning of a stop string is everything so far, and no more is held."""
    output, so_far = OutputText(TOKENIZER, stop), ""
    for char in text:
        output.push(ids_of(char.encode()))
        so_far += char
        if output.stopped:
            break
        held = so_far.removeprefix(output.text)
        assert so_far == output.text + held
        longest = max((n for s in stop for n in range(len(s)) if so_far.endswith(s[:n])), default=0)
        assert len(held) == longest


def test_stop_string_over_several_tokens_and_half_characters() -> None:
    output = OutputText(TOKENIZER, ["\n世"])
    ids = ids_of("one\n世two".encode())
    shown = [output.push([i]) for i in ids]
    assert "".join(shown) == "one"
    assert output.stopped
    assert output.num_tokens == len("one\n世".encode())
    assert output.finish() == ""
    assert output.text == "one"


def test_an_unfinished_stop_string_is_handed_out_at_the_end() -> None:
    output = OutputText(TOKENIZER, ["###"])
    assert output.push(ids_of(b"a##")) == "a"
    assert output.finish() == "##"
    assert output.text == "a##"


@pytest.mark.parametrize(("skip_special", "text"), [(True, "ab"), (False, "a<|im_end|>b")])
def test_control_tokens(skip_special: bool, text: str) -> None:
    output = OutputText(TOKENIZER, skip_special=skip_special)
    output.push([*ids_of(b"a"), END, *ids_of(b"b")])
    assert output.text + output.finish() == text


def test_real_tokens_stream_as_they_decode(default_model: object) -> None:
    from preble_jax.model.tokenizer import load_tokenizer

    tokenizer: Tokenizer = load_tokenizer(default_model)  # type: ignore[arg-type]
    text = "Straße 世界 👩‍👩‍👧‍👦 e\u0301\n" * 3
    ids = tokenizer.encode(text)
    output = OutputText(tokenizer)
    deltas = [output.push([i]) for i in ids]
    assert "".join(deltas) + output.finish() == text
    assert "" in deltas  # some tokens end within a character
    assert "\ufffd" not in "".join(deltas)
