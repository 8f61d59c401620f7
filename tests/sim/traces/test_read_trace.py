"""Traces of every format become the requests they describe."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from preble_jax.errors import ConfigError, InvalidRequestError
from preble_jax.sim.request import Workload
from preble_jax.sim.traces import DEFAULT_OUTPUT, read_arrivals, read_trace
from preble_jax.sim.workloads import make_workload, shared_ratio

Write = Callable[[str], Path]

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,0
2023-11-16 18:15:51.6805900,879,55
"""
VTC = """client,req_time_s,prompt_len,output_len
13,0.000000,13,199
2,0.207938,36,137
13,1.5,40,1
"""


def _rows(*rows: dict[str, object]) -> str:
    return "\n".join(json.dumps(row) for row in rows)


def _row(num_prompt: int, hash_ids: list[int], **more: object) -> dict[str, object]:
    return {"input_length": num_prompt, "output_length": 7, "hash_ids": hash_ids} | more


MOONCAKE = _rows(
    _row(1200, [10, 11, 12], timestamp=1000),
    _row(1300, [10, 11, 13], timestamp=1000),
    _row(512, [10], timestamp=4000, tenant="b"),
)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(text: str) -> Path:
        path = tmp_path / "small_trace.jsonl"
        path.write_text(text)
        return path

    return write


def _read(path: Path, **changes: object) -> Workload:
    arguments: dict[str, object] = {"format": None, "rate": None, "block_size": None, "seed": 0}
    return read_trace(path, **(arguments | changes))


def test_mooncake(write: Write) -> None:
    workload = _read(write(MOONCAKE))
    assert (workload.name, workload.block_size) == ("small_trace", 512)
    first, second, third = workload.requests
    assert [request.arrival_s for request in workload.requests] == [0.0, 0.0, 3.0], "milliseconds after the first"
    assert (first.num_prompt, first.num_output, first.tenant, first.follows) == (1200, 7, "default", None)
    assert first.blocks[:2] == second.blocks[:2] and first.blocks[2] != second.blocks[2]
    assert third.blocks == first.blocks[:1] and third.tenant == "b"
    assert shared_ratio(workload) == (1024 + 512) / 3012


def test_a_rate_stretches_timestamps(write: Write) -> None:
    requests = _read(write(MOONCAKE), rate=0.25).requests
    assert [request.arrival_s for request in requests] == [0.0, 0.0, 8.0]
    assert [request.arrival_s for request in _read(write(VTC), rate=4.0).requests] == pytest.approx(
        [0.0, 0.207938 / 3, 0.5]
    )


def test_what_a_limit_keeps_comes_at_the_rate(write: Write) -> None:
    """Ten a second, then one a minute: the rate is that of the ten."""
    times = [100 * index for index in range(10)] + [60_000 * index for index in range(1, 10)]
    path = write(_rows(*(_row(20, [], timestamp=at) for at in times)))
    assert [request.arrival_s for request in _read(path, rate=2.0, limit=10).requests] == pytest.approx(
        [0.5 * index for index in range(10)]
    )
    assert _read(path, rate=2.0, limit=99) == _read(path, rate=2.0)
    assert [request.arrival_s for request in _read(path, limit=3).requests] == pytest.approx([0.0, 0.1, 0.2])
    assert [request.arrival_s for request in _read(path, rate=2.0, limit=1).requests] == [0.0]
    with pytest.raises(ConfigError, match=r"advance, got 2 requests at one time.*take more of the trace"):
        _read(write(MOONCAKE), rate=2.0, limit=2)


def test_timestamps_in_seconds(write: Write) -> None:
    path = write(MOONCAKE.replace("000", ""))
    assert [request.arrival_s for request in _read(path, time_unit="s").requests] == [0.0, 0.0, 3.0]
    assert [request.arrival_s for request in _read(path, time_unit="ms", limit=2).requests] == [0.0, 0.0]
    assert _read(write(MOONCAKE), time_unit="ms") == _read(write(MOONCAKE))
    in_session = write(_rows(*(_row(20, [], session="a", turn=turn, timestamp=2 * turn) for turn in range(3))))
    for unit, gap_s in ((None, 2.0), ("s", 2.0), ("ms", 0.002)):
        first, second, _ = _read(in_session, rate=1.0, time_unit=unit).requests
        assert second.arrival_s - first.arrival_s == pytest.approx(gap_s)
    with pytest.raises(ConfigError, match="time_unit: expected one of ms, s; got 'min'"):
        _read(path, time_unit="min")
    with pytest.raises(ConfigError, match="time_unit: expected with a trace of format mooncake only, got 's'"):
        _read(write(VTC), time_unit="s")


def test_more_requests_a_second_than_is_likely_are_meant_or_refused(write: Write) -> None:
    """Two a second, in seconds, would be 2,000 in milliseconds; one a second would be 1,000, which is let through."""
    fast = write(_rows(*(_row(20, [], timestamp=0.5 * index) for index in range(9))))
    with pytest.raises(ConfigError, match=r"at most 1000 requests a second on average, got 2000 .*--time-unit s if"):
        _read(fast)
    with pytest.raises(ConfigError, match="--time-unit"):
        _read(fast, limit=1)
    assert _read(fast, time_unit="ms").requests[-1].arrival_s == pytest.approx(0.004)
    assert _read(fast, time_unit="s").requests[-1].arrival_s == 4.0
    assert _read(fast, rate=4.0).requests[-1].arrival_s == pytest.approx(2.0)
    assert len(_read(write(_rows(*(_row(20, [], timestamp=index) for index in range(9))))).requests) == 9
    vtc = "client,req_time_s,prompt_len,output_len\na,0,9,9\na,0.0001,9,9\n"
    assert len(_read(write(vtc)).requests) == 2, "there is no doubt about its unit"


def test_without_timestamps_arrivals_are_poisson_at_the_rate(write: Write) -> None:
    path = write(_rows(*(_row(100 + index, []) for index in range(4_000))))
    requests = _read(path, rate=5.0).requests
    assert [request.num_prompt for request in requests] == [100 + index for index in range(4_000)], "the file's order"
    gaps = np.diff([request.arrival_s for request in requests])
    assert gaps.mean() == pytest.approx(0.2, rel=0.05) and gaps.std() == pytest.approx(0.2, rel=0.05)
    assert _read(path, rate=5.0).requests == requests
    assert _read(path, rate=5.0, seed=1).requests != requests
    with pytest.raises(
        ConfigError, match=r"--rate: expected requests a second for .*small_trace.jsonl.*example --rate"
    ):
        _read(path)


def test_unknown_and_empty_outputs(write: Write) -> None:
    path = write(_rows(_row(10, []) | {"output_length": None}, _row(10, []) | {"output_length": 0}))
    assert [request.num_output for request in _read(path, rate=1.0).requests] == [DEFAULT_OUTPUT, 1]


def test_large_ids_are_numbered_densely(write: Write) -> None:
    huge = 2**64 - 5
    path = write(_rows(_row(32, [huge, 7]), _row(32, [huge, -3])))
    assert [request.blocks for request in _read(path, rate=1.0).requests] == [(0, 1), (0, 2)]


def _sessions(**more: object) -> str:
    rows = []
    for session in ("a", "b", "c"):
        base = ord(session) * 100
        for turn in range(3):
            ids = list(range(base, base + 2 + turn))
            rows.append(_row(16 * len(ids) + 5, ids, session=session, turn=turn, **more))
    return _rows(*rows)


def test_turns_follow_each_other_and_sessions_come_in_random_order(write: Write) -> None:
    path = write(_sessions())
    orders = set()
    for seed in range(8):
        workload = _read(path, rate=2.0, seed=seed)
        assert workload.block_size == 16 and len(workload.requests) == 9
        arrivals = [request.arrival_s for request in workload.requests]
        assert arrivals == sorted(arrivals)
        for index, request in enumerate(workload.requests):
            if request.follows is None:
                assert len(request.blocks) == 2
            else:
                earlier = workload.requests[request.follows]
                assert request.follows < index and request.blocks[:-1] == earlier.blocks
        assert len({request.follows for request in workload.requests}) == 7
        orders.add(tuple(request.blocks[0] for request in workload.requests))
    assert len(orders) > 1


def test_sessions_come_so_often_that_requests_have_the_rate(write: Write) -> None:
    rows = [_row(20, [], session=index // 4, turn=index % 4) for index in range(8_000)]
    requests = _read(write(_rows(*rows)), rate=10.0).requests
    assert requests[-1].arrival_s == pytest.approx(800.0, rel=0.05)


def test_times_in_a_session_are_the_earliest_for_its_turns(write: Write) -> None:
    rows = [_row(20, [], session=name, turn=turn, timestamp=2.5 * turn) for name in "ab" for turn in range(3)]
    workload = _read(write(_rows(*rows)), rate=1.0)
    for request in workload.requests:
        if request.follows is not None:
            assert request.arrival_s - workload.requests[request.follows].arrival_s == pytest.approx(2.5)
    with pytest.raises(ConfigError, match="rate"):
        _read(write(_rows(*rows)))


def test_sessions_with_times_of_the_trace_keep_them(write: Write) -> None:
    rows = [
        _row(20, [], session="a", turn=0, timestamp=0),
        _row(20, [], session="b", turn=0, timestamp=500),
        _row(20, [], session="a", turn=1, timestamp=9000),
    ]
    requests = _read(write(_rows(*rows))).requests
    assert [(request.arrival_s, request.follows) for request in requests] == [(0.0, None), (0.5, None), (9.0, 0)]


def test_azure(write: Write) -> None:
    requests = _read(write(AZURE)).requests
    assert [request.arrival_s for request in requests] == pytest.approx([0.0, 4.314579, 5.0], abs=1e-5)
    assert [(request.num_prompt, request.num_output, request.blocks) for request in requests] == [
        (374, 44, ()),
        (396, 1, ()),
        (879, 55, ()),
    ]


def test_vtc(write: Write) -> None:
    requests = _read(write(VTC)).requests
    assert [(request.tenant, request.num_prompt, request.num_output) for request in requests] == [
        ("13", 13, 199),
        ("2", 36, 137),
        ("13", 40, 1),
    ]
    assert [request.arrival_s for request in requests] == pytest.approx([0.0, 0.207938, 1.5])


@pytest.mark.parametrize(("text", "format"), [(MOONCAKE, "mooncake"), (AZURE, "azure"), (VTC, "vtc")])
def test_the_format_is_found_by_the_content(write: Write, text: str, format: str) -> None:
    path = write("\ufeff\n" + text.replace("\n", "\r\n") + "\r\n\r\n")
    assert _read(path) == _read(path, format=format)


@pytest.mark.parametrize("text", [AZURE, VTC], ids=["azure", "vtc"])
def test_quotes_around_names_do_not_hide_the_format(write: Write, text: str) -> None:
    header, rows = text.split("\n", 1)
    quoted = ",".join(f'"{column}"' for column in header.split(","))
    assert _read(write(f"{quoted}\n{rows}")) == _read(write(text))


def test_a_wrong_format_is_refused(write: Write) -> None:
    with pytest.raises(ConfigError, match=r"one of mooncake, azure, vtc; got 'mooncack', nearest is 'mooncake'"):
        _read(write(MOONCAKE), format="mooncack")
    with pytest.raises(InvalidRequestError, match="line 1: expected a JSON object"):
        _read(write(AZURE), format="mooncake")
    with pytest.raises(InvalidRequestError, match=r"line 1: expected a header with client, .*trace format"):
        _read(write(AZURE), format="vtc")


def test_limit_keeps_the_first(write: Write) -> None:
    everything = _read(write(_sessions()), rate=2.0).requests
    assert _read(write(_sessions()), rate=2.0, limit=4).requests == everything[:4]


def test_length_scale_shrinks_prompts_blocks_and_answers_alike(write: Write) -> None:
    workload = _read(write(MOONCAKE), length_scale=0.25)
    assert workload.block_size == 128
    assert [(request.num_prompt, request.num_output) for request in workload.requests] == [(300, 2), (325, 2), (128, 2)]
    assert shared_ratio(workload) == pytest.approx(shared_ratio(_read(write(MOONCAKE))), abs=1e-9)
    partial = _read(write(_rows(_row(513, [1, 2]), _row(1023, [1, 3]))), rate=1.0, length_scale=0.25)
    assert [(request.num_prompt, len(request.blocks)) for request in partial.requests] == [(129, 2), (256, 2)]
    assert _read(write(MOONCAKE), length_scale=2.0).requests[0].num_prompt == 2400
    with pytest.raises(ConfigError, match="--length-scale: expected one that leaves whole blocks"):
        _read(write(MOONCAKE), length_scale=0.0005)


def test_blocks_round_the_length_scale(write: Write) -> None:
    """Of 64 tokens, 19 are left, not 19.2, and of what no block covers as many in proportion."""
    path = write(_rows(_row(64 * 10, [*range(10)], output_length=640), _row(64 * 10 + 32, [*range(10), 20])))
    workload = _read(path, rate=1.0, block_size=64, length_scale=0.3)
    assert (workload.block_size, workload.length_scale) == (19, 19 / 64)
    first, second = workload.requests
    assert (first.num_prompt, first.num_output, second.num_prompt) == (190, 190, 190 + round(32 * 19 / 64))


@pytest.mark.parametrize("factor", [0.3, 0.1, 0.001, 2.5])
@pytest.mark.parametrize(
    "text",
    [AZURE, VTC, _rows(_row(374, [], timestamp=0), _row(879, [], timestamp=5000))],
    ids=["azure", "vtc", "mooncake"],
)
def test_where_there_are_no_blocks_lengths_scale_freely(write: Write, text: str, factor: float) -> None:
    path = write(text)
    whole, scaled = _read(path), _read(path, length_scale=factor)
    assert scaled.length_scale == factor
    for before, after in zip(whole.requests, scaled.requests, strict=True):
        assert after.num_prompt == max(round(factor * before.num_prompt), 1)
        assert after.num_output == max(round(factor * before.num_output), 1)


@pytest.mark.parametrize(
    "wrong",
    [
        {"rate": 0.0},
        {"rate": float("inf")},
        {"block_size": 0},
        {"limit": 0},
        {"seed": -1},
        {"length_scale": -1.0},
    ],
)
def test_arguments_out_of_range_are_refused(write: Write, wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        _read(write(MOONCAKE), **wrong)


def test_a_rate_cannot_stretch_times_that_stand_still(write: Write) -> None:
    path = write(_rows(_row(20, [], timestamp=5), _row(20, [], timestamp=5)))
    assert [request.arrival_s for request in _read(path).requests] == [0.0, 0.0]
    with pytest.raises(ConfigError, match="timestamps that advance"):
        _read(path, rate=1.0)


def test_times_of_a_trace_as_arrivals_of_a_workload(write: Write) -> None:
    arrivals = read_arrivals(write(AZURE))
    workload = make_workload(
        "unshared", rate=2.0, num_requests=3, duration_s=None, num_groups=2, seed=0, arrivals=arrivals
    )
    times = [request.arrival_s for request in workload.requests]
    assert times == pytest.approx([0.0, 4.314579 / 5, 1.0], abs=1e-5)
    with pytest.raises(InvalidRequestError, match="line 1: expected timestamps"):
        read_arrivals(write(_sessions()))
