"""`preble-jax sim`, `sim sweep` and `plot`: the file, the table, and bad input before anything is simulated."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest
from rich.console import Console

from preble_jax.config import SchedSettings
from serve.cli import main
from serve.sim import make_console
from serve.sim_arguments import parse_fault
from serve.sim_sweep import capacity_table

RUN = ("sim", "--workload", "d2lpm_s1", "--rate", "20", "--groups", "2", "--requests", "60")


def run(*arguments: object, out: Path) -> dict:
    assert main([*RUN, *map(str, arguments), "--json", str(out)]) == 0
    return json.loads(out.read_text())


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    output = capsys.readouterr()
    assert output.out == ""
    [line] = output.err.splitlines()
    assert line.startswith("error: ")
    return line


def test_the_file_has_everything_and_the_table_what_matters(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["preble-jax", *RUN])
    document = run("--placement", "round_robin", "--queue", "fcfs", "--slo-ttft", 1, out=tmp_path / "out.json")
    keys = ["command", "settings", "summary", "groups", "tenants", "service", "requests"]
    assert list(document) == keys
    assert document["command"].startswith("preble-jax sim --workload d2lpm_s1")
    sim = document["settings"]["sim"]
    assert (sim["sched"]["placement"], sim["queue"]["policy"], sim["num_groups"]) == ("round_robin", "fcfs", 2)
    summary = document["summary"]
    assert summary["requests"] == summary["finished"] == len(document["requests"]) == 60
    assert summary["slo"] == {"ttft": 1.0} and 0 < summary["goodput"] <= summary["throughput_per_s"]
    assert sum(group["requests"] for group in document["groups"]) == 60
    assert sum(row["requests"] for row in document["tenants"].values()) == 60
    row = document["requests"][0]
    assert row["status"] == "finished" and row["sent_s"] < row["first_token_s"] < row["finished_s"]
    assert {"index", "tenant", "group", "decision", "cached_tokens", "queue_s"} <= row.keys()
    for tenant, units in document["service"]["tenants"].items():
        assert units[-1] == pytest.approx(document["tenants"][tenant]["service"])

    printed = capsys.readouterr().out
    assert "2 groups of mistral7b_a6000, round_robin + fcfs, seed 0" in " ".join(printed.split())
    assert f"{summary['hit_ratio']:.1%}" in printed and f"{summary['latency_p99_s']:.3f}" in printed
    assert "client-7" in printed


def test_the_same_seed_gives_the_same_file(tmp_path: Path) -> None:
    files = [run("--seed", seed, out=tmp_path / f"{name}.json") for name, seed in (("a", 3), ("b", 3), ("c", 4))]
    requests = [file["requests"] for file in files]
    assert requests[0] == requests[1] != requests[2]


def test_the_scheduler_is_told_the_cost_models_costs_unless_somebody_says_otherwise(tmp_path: Path) -> None:
    told = run(out=tmp_path / "a.json")["settings"]["sim"]["sched"]
    assert told["prefill_token_s"] != SchedSettings().prefill_token_s
    said = run("--config.sched.prefill_token_s=0.5", out=tmp_path / "b.json")["settings"]["sim"]["sched"]
    assert said["prefill_token_s"] == 0.5 and said["decode_token_s"] == told["decode_token_s"]


def test_a_trace_and_an_engine_of_another_size(tmp_path: Path) -> None:
    trace = tmp_path / "some.jsonl"
    rows = [{"input_length": 100, "output_length": 4, "hash_ids": [*range(6), 10 + i]} for i in range(20)]
    trace.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = ["sim", "--trace", str(trace), "--trace-format", "mooncake", "--rate", "5", "--groups", "1"]
    out = tmp_path / "out.json"
    assert main([*common, "--block-size", "16", "--kv-tokens", "4096", "--json", str(out)]) == 0
    summary = json.loads(out.read_text())["summary"]
    assert (summary["requests"], summary["cached_tokens"]) == (20, 19 * 96)
    assert json.loads(out.read_text())["settings"]["source"]["block_size"] == 16
    sizes = ["--prefill-tokens", "32", "--max-num-seqs", "1", "--requests", "5", "--length-scale", "2"]
    assert main([*common, *sizes, "--json", str(out)]) == 0
    document = json.loads(out.read_text())
    assert document["summary"]["requests"] == 5 and document["requests"][0]["num_prompt"] == 200
    assert document["summary"]["num_steps"] >= 7 + 4 * 1, "a prompt of 200 tokens takes 7 steps of 32"


def test_the_scale_that_blocks_allow_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace, out = tmp_path / "some.jsonl", tmp_path / "out.json"
    trace.write_text('{"input_length": 640, "output_length": 2, "hash_ids": [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]}\n')
    scaled = ["--trace", str(trace), "--rate", "5", "--groups", "1", "--length-scale", "0.3", "--block-size", "64"]
    assert main(["sim", *scaled, "--json", str(out)]) == 0
    assert "times 0.296875: 0.3 leaves" in capsys.readouterr().out
    document = json.loads(out.read_text())
    assert (document["summary"]["length_scale"], document["requests"][0]["num_prompt"]) == (19 / 64, 190)
    assert main(["sim", "sweep", *scaled, "--processes", "1"]) == 0
    assert "some: lengths are times 0.296875: 0.3 leaves" in capsys.readouterr().out


def test_a_trace_is_cut_where_the_duration_ends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace, out = tmp_path / "some.csv", tmp_path / "out.json"
    rows = "".join(f"a,{5 + at_s},40,2\n" for at_s in range(10))
    trace.write_text(f"client,req_time_s,prompt_len,output_len\n{rows}")
    common = ["sim", "--trace", str(trace), "--groups", "1", "--json", str(out)]
    for more, count in (
        (["--duration", "4"], 4),
        (["--duration", "4", "--requests", "3"], 3),
        (["--duration", "99"], 10),
    ):
        assert main([*common, *more]) == 0
        assert json.loads(out.read_text())["summary"]["requests"] == count
    poisson = tmp_path / "some.jsonl"
    poisson.write_text('{"input_length": 40, "output_length": 2, "hash_ids": []}\n')
    capsys.readouterr()
    assert main(["sim", "--trace", str(poisson), "--rate", "0.001", "--duration", "0.001"]) == 2
    assert "--duration: expected to reach the first request" in error_line(capsys)


def test_the_first_of_a_trace_come_at_the_rate_and_in_the_unit_that_is_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A burst of four a second and then one a minute, in seconds."""
    trace, out = tmp_path / "some.jsonl", tmp_path / "out.json"
    times = [0.25 * index for index in range(5)] + [60 * index for index in range(1, 5)]
    rows = [{"timestamp": at_s, "input_length": 40, "output_length": 2, "hash_ids": []} for at_s in times]
    common = ["sim", "--trace", str(trace), "--groups", "1", "--json", str(out)]

    def sent(*more: str) -> list[float]:
        assert main([*common, *more]) == 0
        return [row["sent_s"] for row in json.loads(out.read_text())["requests"]]

    trace.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert sent("--rate", "2", "--requests", "5") == pytest.approx([0.0, 0.5, 1.0, 1.5, 2.0])
    whole = sent("--rate", "2")
    assert whole[-1] == pytest.approx(8 / 2)
    assert sent("--rate", "2", "--duration", "1.5") == [at_s for at_s in whole if at_s < 1.5]
    assert sent("--time-unit", "s") == pytest.approx(times)
    trace.write_text("".join(json.dumps(row) + "\n" for row in rows[:5]))
    capsys.readouterr()
    assert main(common) == 2
    assert "--time-unit: expected timestamps in milliseconds" in error_line(capsys)


def test_a_file_that_cannot_be_written_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object, **more: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "open", full)
    monkeypatch.setattr(Path, "write_text", full)
    few = ["--workload", "unshared", "--rate", "5", "--requests", "3", "--groups", "1"]
    for mode, more in (([], []), (["sweep"], ["--processes", "1"])):
        assert main(["sim", *mode, *few, *more, "--json", str(tmp_path / "out.json")]) == 2
        output = capsys.readouterr()
        [line] = output.err.splitlines()
        assert line.startswith("error: ") and "out.json" in line and "No space left on device" in line
        assert mode or "hit ratio" in output.out, "what could not be written is printed at least"


def test_a_reader_that_goes_away_does_not_cost_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*arguments: object, **more: object) -> None:
        raise SystemExit(1)  # what rich makes of a broken pipe

    monkeypatch.setattr(Console, "print", gone)
    with pytest.raises(SystemExit):
        run(out=tmp_path / "out.json")
    assert json.loads((tmp_path / "out.json").read_text())["summary"]["finished"] == 60


def test_faults_and_lag(tmp_path: Path) -> None:
    arguments = ["--fault", "kill:1@1", "--fault", "restart:1@2", "--event-lag", 0.05, "--network", 0.001]
    arguments += ["--groups-per-host", 2]
    document = run(*arguments, out=tmp_path / "out.json")
    sim = document["settings"]["sim"]
    assert [fault["kind"] for fault in sim["faults"]] == ["kill", "restart"]
    assert (sim["event_lag_s"], sim["network_s"], sim["groups_per_host"]) == (0.05, 0.001, 2)
    assert document["summary"]["retried"] + document["summary"]["failed"] > 0
    assert parse_fault("drain:3@0.5").group == 3


def test_a_sweep_and_its_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tmp_path / "rows.jsonl"
    lists = ["--placement", "e2,round_robin", "--seed", "0,1", "--requests", "20", "--processes", "1"]
    sweep = ["sim", "sweep", "--workload", "toolbench", *lists]
    assert main([*sweep, "--rate", "4,8", "--json", str(rows)]) == 0
    assert "means over 2 seeds" in capsys.readouterr().out
    assert len(rows.read_text().splitlines()) == 8
    assert main([*sweep, "--capacity", "--slo", "ttft_p90=2", "--tolerance", "0.5"]) == 0
    printed = capsys.readouterr().out
    assert "highest rate with ttft_p90=2" in printed
    assert printed.count("no capacity found: the 20 requests are over before 2 s") == 2
    if importlib.util.find_spec("matplotlib") is None:
        return
    run(out=tmp_path / "one.json")
    pictures = [["rate", rows], ["ablation", tmp_path / "one.json"], ["service", tmp_path / "one.json"]]
    for arguments in pictures:
        picture = tmp_path / f"{arguments[0]}.svg"
        metric = ["--metric", "ttft_mean_s"] if arguments[0] != "service" else []
        assert main(["plot", *map(str, arguments), *metric, "--output", str(picture)]) == 0
    assert b"round_robin" in (tmp_path / "rate.svg").read_bytes()
    first = (tmp_path / "service.svg").read_bytes()
    assert b"client-7" in first
    assert main(["plot", *map(str, pictures[-1]), "--output", str(tmp_path / "service.svg")]) == 0
    assert (tmp_path / "service.svg").read_bytes() == first, "equal input, equal file"


@pytest.fixture
def same_names(tmp_path: Path) -> list[str]:
    """Traces of one name in folders a and b, of longer and shorter prompts."""
    paths = []
    for folder, num_prompt in (("a", 400), ("b", 40)):
        (tmp_path / folder).mkdir()
        paths.append(tmp_path / folder / "trace.csv")
        rows = "".join(f"c,{at_s / 10},{num_prompt},2\n" for at_s in range(10))
        paths[-1].write_text(f"client,req_time_s,prompt_len,output_len\n{rows}")
    return [str(path) for path in paths]


def test_traces_of_one_name_are_no_seeds_of_each_other(
    same_names: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    sweep = ["sim", "sweep", "--trace", ",".join(same_names), "--groups", "1", "--processes", "1", "--json", str(rows)]
    assert main([*sweep, "--rate", "5,10"]) == 0
    printed = capsys.readouterr().out
    assert [printed.count(f"{folder}/trace.csv") for folder in "ab"] == [2, 2]
    old = [json.loads(line) for line in rows.read_text().splitlines()]
    for row in old:
        del row["settings"]  # as they were written before
    rows.write_text("".join(json.dumps(row) + "\n" for row in old))
    assert main([*sweep, "--rate", "5,10"]) == 0
    assert capsys.readouterr().out == printed
    assert len(rows.read_text().splitlines()) == 4, "nothing was run again"
    assert main([*sweep, "--capacity", "--slo", "ttft_p90=1", "--tolerance", "0.5"]) == 0
    printed = capsys.readouterr().out
    assert [printed.count(f"{folder}/trace.csv") for folder in "ab"] == [2, 2], "a row and a sentence each"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rate", "3"], "expected --workload NAME or --trace FILE"),
        (["--workload", "toolbench"], "--rate: expected requests a second"),
        (["--workload", "toolbensh", "--rate", "3"], "toolbench"),
        (["--workload", "toolbench", "--rate", "3", "--duration", "0.0001"], "--duration: expected to reach the first"),
        (["--workload", "toolbench", "--rate", "1e-9"], "of toolbench at 1e-09 requests/s, got the original's"),
        (["--workload", "toolbench", "--rate", "3", "--arrivals", "nowhere.csv"], "--arrivals: expected a file that"),
        (["--workload", "toolbench", "--rate", "3", "--seed", "-1"], "seed: expected a finite number >= 0"),
        (["--workload", "toolbench", "--rate", "0"], "--rate: expected a number above 0, got 0"),
        (["--workload", "toolbench", "--rate", "3", "--duration", "-1"], "--duration: expected a number above 0"),
        (["--workload", "toolbench", "--rate", "3,4"], "expected one value an argument, got 2 combinations"),
        (["--workload", "toolbench", "--rate", "3", "--cost", "a600"], "mistral7b_a6000"),
        (["--workload", "toolbench", "--rate", "3", "--placement", "e3"], "sched.placement: expected"),
        (["--workload", "toolbench", "--rate", "3", "--queue", "fifo"], "queue.policy: expected"),
        (["--workload", "toolbench", "--rate", "3", "--groups", "0"], "num_groups: expected"),
        (["--workload", "toolbench", "--rate", "3", "--fault", "kill:9@1"], "faults: expected"),
        (["--workload", "toolbench", "--rate", "3", "--fault", "kill@1"], "for example kill:1@30, got 'kill@1'"),
        (["--workload", "toolbench", "--rate", "3", "--slo-ttft", "0"], "--slo-ttft: expected seconds above 0"),
        (["--workload", "toolbench", "--rate", "3", "--json", "nowhere/x.json"], "--json: expected a file in a folder"),
        (["--workload", "toolbench", "--rate", "3", "--json", "."], "--json: expected a file, got the folder ."),
        (
            ["--workload", "toolbench", "--rate", "3", "--length-scale", "2"],
            "--length-scale: expected with --trace only",
        ),
        (["--workload", "toolbench", "--rate", "3", "--block-size", "16"], "--block-size: expected with --trace only"),
        (["--workload", "toolbench", "--rate", "3", "--trace-format", "vtc"], "--trace-format: expected with --trace"),
        (["--workload", "toolbench", "--rate", "3", "--time-unit", "s"], "--time-unit: expected with --trace only"),
        (["--trace", "nowhere.jsonl"], "nowhere.jsonl"),
        (
            ["sweep", "--workload", "toolbench", "--rate", "3", "--json", "."],
            "--json: expected a file, got the folder .",
        ),
        (["sweep", "--workload", "toolbench", "--capacity", "--slo", "p99=5"], "--slo: expected METRIC_pN=SECONDS"),
        (["sweep", "--workload", "toolbench", "--capacity", "--rate", "3,4"], "--rate: expected without --capacity"),
        (["sweep", "--workload", "toolbench", "--capacity", "--tolerance", "0"], "--tolerance: expected a share"),
        (["sweep", "--workload", "toolbench", "--rate", "1", "--tolerance", "0.1"], "--tolerance: expected with --cap"),
        (["sweep", "--workload", "toolbench", "--rate", "1", "--slo", "foo"], "--slo: expected with --capacity only"),
        (["sweep", "--workload", "toolbench", "--capacity", "--slo-ttft", "1"], "got 1; give --slo ttft_p99=1"),
        (["--workload", "toolbench", "--rate", "3", "--slo", "foo"], "--slo: expected with `preble-jax sim sweep`"),
        (
            ["--workload", "toolbench", "--rate", "3", "--processes", "1"],
            "--processes: expected with `preble-jax sim s",
        ),
        (["--workload", "toolbench", "--rate", "3", "--tolerance", "0.1"], "--tolerance: expected with `preble-jax s"),
        (["--workload", "toolbench", "--capacity"], "--capacity: expected with `preble-jax sim sweep` only"),
        (["--workload", "toolbench", "--trace", "x.jsonl", "--rate", "5"], "got both; leave one out"),
        (["sweep", "--workload", "toolbench", "--rate", "1", "--processes", "-1"], "--processes: expected"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sim", *arguments]) == 2
    assert words in error_line(capsys)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--workload", "toolbench,nosuch", "--rate", "8"], "got 'nosuch'; the nearest is"),
        (["--trace", "{trace},nowhere.csv"], "--trace: expected a file that can be read, got nowhere.csv"),
        (["--workload", "toolbench", "--rate", "8", "--seed", "0,-1"], "seed: expected a finite number >= 0, got -1"),
    ],
)
def test_a_sweep_does_not_begin_what_it_cannot_end(
    arguments: list[str],
    words: str,
    same_names: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def begun(*arguments: object) -> None:
        raise AssertionError("begun")

    monkeypatch.setattr("preble_jax.sim.sweep.run_job", begun)
    given = [argument.format(trace=same_names[0]) for argument in arguments]
    assert main(["sim", "sweep", *given, "--processes", "1"]) == 2
    assert words in error_line(capsys)


@pytest.mark.parametrize(
    ("content", "arguments", "words"),
    [
        ("{}", "--workload toolbench --rate 3 --cost", "error: cost: expected prefill_base_s in "),
        (
            "client,req_time_s,prompt_len,output_len\na,1,9,9\na,1,9,9\n",
            "--workload toolbench --rate 3 --arrivals",
            "expected times that advance, got 2 at one time, which cannot be stretched to a rate; give",
        ),
        ('{"input_length": 9, "output_length": 9, "hash_ids": []}', "--trace", "--rate: expected requests a second"),
    ],
    ids=["cost", "arrivals", "trace"],
)
def test_an_error_names_what_was_given(
    content: str, arguments: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "given.json").write_text(content)
    assert main(["sim", *arguments.split(), str(tmp_path / "given.json")]) == 2
    assert words in error_line(capsys)


def test_drawing_what_cannot_be_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other.json").write_text('{"a": 1}')
    picture = str(tmp_path / "x.svg")
    assert main(["plot", "rate", "x.jsonl", "--output", "x.gif"]) == 2
    assert "ends in .svg, .png, .pdf, got x.gif" in error_line(capsys)
    if importlib.util.find_spec("matplotlib"):
        empty = {"settings": {}, "summary": {}, "requests": [], "service": {}}
        (tmp_path / "empty.json").write_text(json.dumps(empty))
        (tmp_path / "none.json").write_text(json.dumps(empty | {"summary": None}))
        for kind, name, words in (
            ("service", "other", "expected what `preble-jax sim"),
            ("rate", "other", "expected a line of"),
            ("rate", "empty", "empty.json: settings: expected what `preble-jax sim --json` writes there"),
            ("service", "empty", "empty.json: settings: expected what"),
            ("rate", "none", "expected a line of"),
        ):
            assert main(["plot", kind, str(tmp_path / f"{name}.json"), "--output", picture]) == 2
            assert words in error_line(capsys)
        assert main(["plot", "rate", "nowhere.jsonl", "--output", picture]) == 2
        assert "nowhere.jsonl: expected a file of `preble-jax sim`" in error_line(capsys)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["plot", "rate", "x.jsonl", "--output", picture]) == 2
    assert "pip install 'preble-jax[plot]'" in error_line(capsys)


@pytest.mark.parametrize(("capacities", "cells"), [([8.0], "8.00 - 50.0%"), ([8.0, 8.0], "8.00 ±0.00 50.0%")])
def test_one_seed_has_no_interval(capacities: list[float], cells: str, capsys: pytest.CaptureFixture[str]) -> None:
    labels = {"workload": "chat", "groups": 4, "placement": "e2", "queue": "fair", "target": "ttft_p99=5", "probes": 3}
    summary = {"hit_ratio": 0.5, "requests": 1000}
    rows = [{**labels, "seed": seed, "capacity": found, "summary": summary} for seed, found in enumerate(capacities)]
    make_console().print(capacity_table(rows, "ttft_p99=5"))
    assert f"chat 4 e2 fair {cells} {3 * len(rows)}" in " ".join(capsys.readouterr().out.split())


def test_the_help_says_what_takes_lists_and_what_needs_sweep(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["sim", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--rate R,... " in text and "--requests N " in text and "take lists with `sim sweep`, one value" in text
    assert text.index("with sweep only:") < text.index("--capacity find") < text.index("--slo METRIC_pN=S of")


def test_lists_of_numbers_are_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["sim", "--workload", "toolbench", "--rate", "3,x"])
    assert "expected numbers with commas between them, got '3,x'" in capsys.readouterr().err


def test_the_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sim", "--list"]) == 0
    printed = capsys.readouterr().out
    assert "toolbench_zipf" in printed and "llama70b_tp2_h100" in printed
