"""Bad traces are refused with file, line, what was expected, what came, and the fix."""

import gzip
import json
from pathlib import Path

import pytest

from preble_jax.errors import InvalidRequestError
from preble_jax.sim.traces import read_trace

GOOD: dict[str, object] = {"timestamp": 1000, "input_length": 40, "output_length": 3, "hash_ids": [1, 2, 3]}


def _refusal(path: Path, **changes: object) -> str:
    arguments: dict[str, object] = {"format": None, "rate": None, "block_size": None, "seed": 0}
    with pytest.raises(InvalidRequestError) as caught:
        read_trace(path, **(arguments | changes))
    return str(caught.value)


def _without(name: str) -> dict[str, object]:
    return {key: value for key, value in GOOD.items() if key != name}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            _without("input_length"),
            "expected a field 'input_length', got the fields timestamp, output_length, hash_ids",
        ),
        (_without("output_length"), "expected a field 'output_length'"),
        (_without("hash_ids"), "expected a field 'hash_ids'"),
        (_without("timestamp"), "timestamp: expected one, as in line 1, got none"),
        (GOOD | {"session": "a"}, "session: expected none, as in line 1, got one"),
        (GOOD | {"turn": 1}, "turn: expected none, as in line 1, got one"),
        (GOOD | {"timestamp": 999}, "times must not run backwards"),
        (GOOD | {"timestamp": "soon"}, "timestamp: expected a number, got 'soon'"),
        (GOOD | {"timestamp": None}, "timestamp: expected a number, got None"),
        (GOOD | {"timestamp": float("nan")}, "timestamp: expected a number, got nan"),
        (GOOD | {"input_length": "40"}, "input_length: expected a number, got '40'"),
        (GOOD | {"input_length": True}, "input_length: expected a number, got True"),
        (GOOD | {"input_length": None}, "input_length: expected a number, got None"),
        (GOOD | {"input_length": 40.5}, "input_length: expected a whole number of at least 1, got 40.5"),
        (GOOD | {"input_length": 0}, "input_length: expected a whole number of at least 1, got 0"),
        (GOOD | {"input_length": 10**400}, "input_length: expected a number"),
        (GOOD | {"output_length": -1}, "output_length: expected a whole number of at least 0, got -1"),
        (GOOD | {"tenant": ""}, "tenant: expected a name, got ''"),
        (GOOD | {"tenant": ["a"]}, "tenant: expected a name"),
        (GOOD | {"hash_ids": None}, "hash_ids: expected a list of block ids, got None"),
        (GOOD | {"hash_ids": [1, 2.5]}, "hash_ids: expected whole numbers, got 2.5"),
        (GOOD | {"hash_ids": [1, True, 3]}, "hash_ids: expected whole numbers, got True"),
        (GOOD | {"hash_ids": ["1"]}, "hash_ids: expected whole numbers, got '1'"),
        (GOOD | {"hash_ids": [1, 4, 3]}, "expected block 3 after block 2, as in line 1, got it after block 4"),
        (
            GOOD | {"hash_ids": [2, 1, 3]},
            "expected block 2 after block 1, as in line 1, got it at the begin of a prompt",
        ),
        (
            GOOD | {"hash_ids": [7, 1, 3]},
            "expected block 1 at the begin of a prompt, as in line 1, got it after block 7",
        ),
        (
            GOOD | {"hash_ids": [5, 6, 5]},
            "expected block 5 at the begin of a prompt, as in line 2, got it after block 6",
        ),
        (
            GOOD | {"input_length": 400},
            "hash_ids: expected blocks of 11 to 19 tokens, as by lines 1 and 1, got 3 blocks",
        ),
        (GOOD | {"input_length": 2}, "hash_ids: expected blocks of 11 to 19 tokens"),
        (GOOD | {"input_length": 10**12}, "input_length: expected at most 16777216, got 1e+12"),
        (GOOD | {"output_length": 1e300}, "output_length: expected at most 16777216, got 1e+300"),
        ([GOOD], "expected a JSON object, got [{"),
    ],
)
def test_a_bad_row_is_refused_by_file_and_line(tmp_path: Path, row: object, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n{json.dumps(row)}\n{json.dumps(GOOD | {'timestamp': 2000})}\n")
    refusal = _refusal(path)
    assert refusal.startswith(f"{path}, line 2: ")
    assert message in refusal
    assert ";" in refusal, "says what to do"


def test_broken_json(tmp_path: Path) -> None:
    path = tmp_path / "cut.jsonl"
    path.write_text(json.dumps(GOOD) + "\n\n" + json.dumps(GOOD)[:50])
    assert f"{path}, line 3: expected a JSON object" in _refusal(path)


def test_a_given_block_size_has_to_fit(tmp_path: Path) -> None:
    path = tmp_path / "sizes.jsonl"
    path.write_text("\n".join(json.dumps(GOOD | {"input_length": length}) for length in (50, 39)))
    assert "line 1: hash_ids: expected 6 full blocks of 8 tokens for a prompt of 50" in _refusal(path, block_size=8)
    assert "line 2: hash_ids: expected 1 full blocks of 20 tokens for a prompt of 39" in _refusal(path, block_size=20)
    assert read_trace(path, None, rate=None, block_size=13, seed=0).block_size == 13


@pytest.mark.parametrize(
    ("turns", "times", "message"),
    [
        ([0, 1, 1], [0, 0, 0], "turn: expected more than 1 of line 2 in session 'a', got 1"),
        ([0, 2, 1], [0, 0, 0], "turn: expected more than 2 of line 2 in session 'a', got 1"),
        ([0, 1, 2], [0, 5, 4], "times must not run backwards, sort each session"),
    ],
)
def test_sessions_that_run_backwards(tmp_path: Path, turns: list[int], times: list[int], message: str) -> None:
    path = tmp_path / "sessions.jsonl"
    rows = [
        _without("timestamp") | {"session": "a", "turn": turn, "timestamp": at}
        for turn, at in zip(turns, times, strict=True)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    refusal = _refusal(path, rate=1.0)
    assert refusal.startswith(f"{path}, line 3: ") and message in refusal


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: expected a row, got an empty file"),
        (" \n\n", "line 1: expected a row, got an empty file"),
        ("hello\nworld\n", "line 1: expected JSON lines (mooncake) or a CSV header"),
        ("a" * 200_000, "or name the one that it has: --trace-format"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "expected rows after the header, got none"),
        (
            "TIMESTAMP,ContextTokens\n2023-11-16 18:15:46,3\n",
            "line 1: expected a header with TIMESTAMP, ContextTokens, ",
        ),
        ("client,prompt_len,output_len\n1,2,3\n", "without req_time_s"),
    ],
)
def test_files_without_requests(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "none.csv"
    path.write_text(text)
    refusal = _refusal(path)
    assert refusal.startswith(str(path)) and message in refusal


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("1,0.1,5", "expected 4 cells (client,req_time_s,prompt_len,output_len), got 3"),
        ("1,0.1,5,6,7", "expected 4 cells"),
        ("1,x,5,6", "req_time_s: expected a number, got 'x'"),
        ("1,0.1,5.5,6", "prompt_len: expected a whole number of at least 1, got '5.5'"),
        ("1,0.1,0,6", "prompt_len: expected a whole number of at least 1, got '0'"),
        ("1,0.1,5,", "output_len: expected a number, got ''"),
        (",0.1,5,6", "client: expected a name, got ''"),
        ("1,-0.1,5,6", "times must not run backwards"),
    ],
)
def test_a_bad_row_of_vtc(tmp_path: Path, row: str, message: str) -> None:
    path = tmp_path / "vtc.csv"
    path.write_text(f"client,req_time_s,prompt_len,output_len\n0,0.0,4,4\n{row}\n")
    refusal = _refusal(path)
    assert refusal.startswith(f"{path}, line 3: ") and message in refusal


@pytest.mark.parametrize("time", ["18:15", "46", "2023-13-16 18:15:46"])
def test_a_bad_time_of_azure(tmp_path: Path, time: str) -> None:
    path = tmp_path / "azure.csv"
    path.write_text(f"TIMESTAMP,ContextTokens,GeneratedTokens\n{time},4,4\n")
    assert f"line 2: TIMESTAMP: expected a time such as 2023-11-16 18:15:46.68, got '{time}'" in _refusal(path)


@pytest.mark.parametrize("last_s", [1e9, 1e300])
def test_times_that_take_years(tmp_path: Path, last_s: float) -> None:
    path = tmp_path / "vtc.csv"
    path.write_text(f"client,req_time_s,prompt_len,output_len\n0,5.0,4,4\n1,{last_s},4,4\n")
    for rate in (None, 1.0):
        assert f"{path}, line 3: expected at most 100000000 s after the first, in line 2" in _refusal(path, rate=rate)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert "expected a trace file that can be read" in _refusal(tmp_path / "missing.jsonl")
    assert "expected a trace file that can be read" in _refusal(tmp_path)
    binary = tmp_path / "binary.jsonl"
    binary.write_bytes(b'{"a": 1}\n\x93\xff')
    assert f"{binary}, line 2: expected UTF-8 text, got byte 0x93" in _refusal(binary)


def test_packed_files(tmp_path: Path) -> None:
    """By gzip they are read, line ends of Windows included; a part of one, or another packer's, is told apart."""
    text = "client,req_time_s,prompt_len,output_len\r\na,0,7,4\r\na,1,9,4\r\n"
    packed, part, other = (tmp_path / f"trace.csv.{end}" for end in ("gz", "part.gz", "zst"))
    packed.write_bytes(gzip.compress(text.encode()))
    requests = read_trace(packed, None, rate=None, block_size=None, seed=0).requests
    assert [request.num_prompt for request in requests] == [7, 9]
    for bad in (
        packed.read_bytes()[:-12],
        b"\x1f\x8b?" + packed.read_bytes()[3:],
        packed.read_bytes()[:30] + b"abcdef",
    ):
        part.write_bytes(bad)
        assert f"{part}: expected a whole gzip file" in _refusal(part)
    other.write_bytes(b"\x28\xb5\x2f\xfd\x24\x00")
    assert f"unpack it: zstd -d {other}" in _refusal(other)
