"""A profiler's trace of XLA programs on the CPU, by part of the model.

The trace has an event for every operation, with the operation's name in the compiled program. The program's text says
for each operation which source lines it was traced from, innermost first. The first line that a pattern of PARTS
matches decides.
"""

from __future__ import annotations

import gzip
import json
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import jax

# Matched against "file function source line". The order decides between patterns that match the same line.
_PATTERNS = {
    "sampling": r"model/sampling\.py|_sample\(",
    "kv write": r"\bwrite_kv\b",
    "rotation, kv write": r"cpu/rotate\.py",
    "attention": r"kernels_pallas/(?!cpu/(call|embedding|matmul|scores))|\b_attend\(|paged_attention",
    "rotation": r"model/rope\.py|\brotat",
    "qkv": r"\.qkv\b",
    "out": r"self\.out\b",
    "mlp": r"MLP\.|\.gate_up\b|\.down\b",
    "norms": r"RMSNorm\.",
    "residual": r"decoder\.py \S+ .*\bx \+",
    "lm head": r"decoder\.py \S+ .*(logits|lm_head|scores)",
    "embedding": r"decoder\.py \S+ .*embedding",
}
PARTS = (*_PATTERNS, "other", "between operations")
_CONTAINERS = ("while", "call", "conditional")

Parts = dict[str, float]


def trace_parts(run: Callable[[], None], modules: Collection[str], text_of: Callable[[int], str]) -> list[Parts]:
    """Runs `run` under the profiler. Returns seconds by part for each run of a program of these modules, in order.

    text_of: the compiled text of the program that ran as number i.
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, create_perfetto_trace=True):
            run()
        (file,) = Path(folder).rglob("perfetto_trace.json.gz")
        with gzip.open(file) as stream:
            trace = json.load(stream)
    events = trace["traceEvents"] if isinstance(trace, dict) else trace
    runs: dict[str, list[tuple[float, float, str]]] = defaultdict(list)
    for event in events:
        details = event.get("args") or {}
        if event.get("ph") == "X" and "hlo_op" in details and details.get("hlo_module") in modules:
            runs[details["run_id"]].append((event["ts"], event["dur"], details["hlo_op"]))
    ordered = sorted(runs.values(), key=min)
    return [_by_part(events, operation_parts(text_of(number))) for number, events in enumerate(ordered)]


def module_name(text: str) -> str:
    """Of a compiled program."""
    found = re.match(r"HloModule ([\w.\-]+)", text)
    return found[1] if found else ""


def _by_part(events: Sequence[tuple[float, float, str]], part_of: Mapping[str, str]) -> Parts:
    """Loops and calls contain their operations and do not count themselves; what no operation covers is counted
    apart. Operations that overlap (there are few) share their time in the order of their starts."""
    found: Parts = defaultdict(float)
    covered = first = min(start for start, _, _ in events)
    for start, duration, name in sorted(events):
        if name.split(".")[0] in _CONTAINERS:
            continue
        end = start + duration
        found[part_of.get(name, "other")] += max(0.0, end - max(start, covered)) / 1e6
        covered = max(covered, end)
    last = max(start + duration for start, duration, _ in events)
    found["between operations"] = (last - first) / 1e6 - sum(found.values())
    return dict(found)


@lru_cache(maxsize=16)
def operation_parts(text: str) -> Mapping[str, str]:
    """Operation -> part, from a compiled program's text. A fusion without lines of its own has those of what it
    computes last."""
    lines_of_frame = _frames(text)
    computation, roots, found, calls = "", {}, {}, {}
    for line in text.splitlines():
        header = re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if header:
            computation = header[1]
            continue
        instruction = re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)
        if not instruction:
            continue
        frame = re.search(r"stack_frame_id=(\d+)", line)
        part = _part(lines_of_frame.get(int(frame[1]), ())) if frame else None
        if part:
            found[instruction[2]] = part
            roots[computation] = part  # the last one stays: the root, or what comes before it
        called = re.search(r"(?:calls|to_apply)=%?([\w.\-]+)", line)
        if called:
            calls[instruction[2]] = called[1]
    for name, target in calls.items():
        if name not in found and target in roots:
            found[name] = roots[target]
    return found


def _part(lines: Sequence[str]) -> str | None:
    for line in lines:
        for part, pattern in _PATTERNS.items():
            if re.search(pattern, line):
                return part
    return None


def _frames(text: str) -> Mapping[int, tuple[str, ...]]:
    """Stack frame -> its source lines, innermost first, each as "file function line"."""
    tables: dict[str, dict[int, str]] = defaultdict(dict)
    table = ""
    for line in text.splitlines():
        if line.startswith(("HloModule", "%", "ENTRY")) and table:
            break
        if line in ("FileNames", "FunctionNames", "FileLocations", "StackFrames"):
            table = line
        elif entry := re.match(r"(\d+) (.*)", line):
            tables[table][int(entry[1])] = entry[2].strip('"')
    locations = {number: _location(entry, tables) for number, entry in tables["FileLocations"].items()}
    entries = {number: _fields(entry) for number, entry in sorted(tables["StackFrames"].items())}
    # Some versions print a parent's number plus one, so that the outermost frame seems to be its own parent.
    excess = int(any(fields.get("parent_frame_id") == number for number, fields in entries.items()))
    frames: dict[int, tuple[str, ...]] = {}
    for number, fields in entries.items():
        outer = frames.get(fields.get("parent_frame_id", 0) - excess, ())
        frames[number] = (locations.get(fields["file_location_id"], ""), *outer)
    return frames


def _location(entry: str, tables: Mapping[str, Mapping[int, str]]) -> str:
    fields = _fields(entry)
    file = tables["FileNames"].get(fields["file_name_id"], "")
    function = tables["FunctionNames"].get(fields["function_name_id"], "")
    return f"{file} {function} {_source_line(file, fields['line'])}"


def _fields(entry: str) -> dict[str, int]:
    return {key: int(value) for key, value in re.findall(r"(\w+)=(\d+)", entry)}


@lru_cache(maxsize=4096)
def _source_line(file: str, number: int) -> str:
    try:
        return Path(file).read_text(encoding="utf-8").splitlines()[number - 1].strip()
    except (OSError, IndexError):
        return ""
