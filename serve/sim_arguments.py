"""The arguments of `preble-jax sim`, `preble-jax sim sweep` and `preble-jax plot`, and the scenarios they stand for."""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from preble_jax.config_files import load_config
from preble_jax.errors import ConfigError

if TYPE_CHECKING:
    from preble_jax.sim.scenario import Scenario, Source
    from preble_jax.sim.settings import Fault
    from preble_jax.sim.slo import Slo

T = TypeVar("T")
DEFAULT_COST = "mistral7b_a6000"
DEFAULT_SLO = "ttft_p99=5"
DEFAULT_TOLERANCE = 0.03
FAULTS = ("kill", "restart", "drain", "undrain")


def add_sim_arguments(parser: argparse.ArgumentParser) -> None:
    sweep = "every combination of what is given as lists, for example --rate 4,8"
    parser.add_argument("mode", nargs="?", choices=["sweep"], help=sweep)
    what = parser.add_argument_group("what is simulated")
    what.add_argument(
        "--workload", type=_list_of(str), default=(), metavar="NAME,...", help="a generator; --list: names"
    )
    what.add_argument("--trace", type=_list_of(Path), default=(), metavar="FILE,...", help="a trace instead")
    what.add_argument("--trace-format", metavar="F", help="mooncake, azure or vtc; default: told by the content")
    what.add_argument("--time-unit", choices=["ms", "s"], help="of timestamps beside hash_ids; default: milliseconds")
    what.add_argument("--rate", type=_list_of(float), default=(), metavar="R,...", help="requests/s of the cluster")
    what.add_argument("--requests", type=int, metavar="N", help="so many requests; of a trace: the first N")
    what.add_argument("--duration", type=float, metavar="S", help="so many seconds of them; default: the original's")
    what.add_argument("--arrivals", type=Path, metavar="FILE", help="a trace whose times the workload comes at")
    what.add_argument("--block-size", type=int, metavar="B", help="tokens a block id of the trace; default: told by it")
    what.add_argument("--length-scale", type=float, default=1.0, metavar="X", help="multiplies a trace's lengths")
    what.add_argument("--seed", type=_list_of(int), default=(0,), metavar="S,...", help="of workload and policies")
    _cluster_arguments(parser.add_argument_group("the cluster"))
    _output_arguments(parser.add_argument_group("what comes out"))
    _sweep_arguments(parser.add_argument_group("with sweep only"))
    parser.epilog = "Arguments with ,... take lists with `sim sweep`, one value with `sim`."


def _cluster_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--groups", type=_list_of(int), default=(4,), metavar="N,...", help="device groups; default 4")
    group.add_argument("--placement", type=_list_of(str), default=(None,), metavar="P,...", help="sched.placement")
    group.add_argument("--queue", type=_list_of(str), default=(None,), metavar="Q,...", help="queue.policy")
    group.add_argument("--cost", default=DEFAULT_COST, metavar="NAME", help="a cost model, or a file of `profile`")
    group.add_argument(
        "--kv-tokens", type=int, default=0, metavar="K", help="tokens a group holds; 0: the cost model's"
    )
    group.add_argument("--prefill-tokens", type=int, default=0, metavar="N", help="prompt tokens a step; 0: likewise")
    group.add_argument("--max-num-seqs", type=int, default=0, metavar="N", help="running sequences; 0: likewise")
    group.add_argument("--event-lag", type=float, default=0.0, metavar="S", help="what groups report arrives later")
    beside = "groups that share a machine and slow each other down, where the cost model was measured for it"
    group.add_argument("--groups-per-host", type=int, default=1, metavar="N", help=beside)
    group.add_argument("--network", type=float, default=0.0, metavar="S", help="from the frontend to a group")
    group.add_argument("--horizon", type=float, metavar="S", help="stop the simulated clock here")
    fault = "kill, restart, drain or undrain a group: kill:1@30; may be given several times"
    group.add_argument("--fault", action="append", default=[], metavar="KIND:GROUP@S", help=fault)


def _output_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--json", type=Path, metavar="OUT", help="everything, with a row a request; sweep: a line a run")
    group.add_argument("--slo-ttft", type=float, metavar="S", help="goodput: time to the first token at most")
    group.add_argument("--slo-latency", type=float, metavar="S", help="goodput: latency at most")
    group.add_argument("--slo-tpot", type=float, metavar="S", help="goodput: time between tokens at most")
    group.add_argument("--list", action="store_true", help="print the names of workloads and cost models")


def _sweep_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--processes", type=int, metavar="N", help="at a time; default: one a core")
    group.add_argument("--capacity", action="store_true", help="find the highest rate that keeps --slo, by bisection")
    slo, tolerance = (f"of --capacity; default {value}" for value in (DEFAULT_SLO, DEFAULT_TOLERANCE))
    group.add_argument("--slo", metavar="METRIC_pN=S", help=slo)
    group.add_argument("--tolerance", type=float, metavar="X", help=tolerance)


def add_plot_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("kind", choices=["rate", "ablation", "service"], help="what is drawn; docs/simulator.md")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="of `sim` or of `sim sweep`")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help=".svg, .png or .pdf")
    parser.add_argument("--metric", metavar="KEY", help="of the summary; default: latency_mean_s and latency_p99_s")
    parser.add_argument("--title", default="", metavar="TEXT")


def _list_of(kind: Callable[[str], T]) -> Callable[[str], tuple[T, ...]]:
    def parse(text: str) -> tuple[T, ...]:
        try:
            return tuple(kind(part.strip()) for part in text.split(","))
        except ValueError:
            words = {int: "whole numbers", float: "numbers"}.get(kind, "names")  # type: ignore[call-overload]
            raise argparse.ArgumentTypeError(f"expected {words} with commas between them, got {text!r}") from None

    return parse


def refuse_idle(arguments: argparse.Namespace) -> None:
    """Raises ConfigError for what is given and would do nothing."""
    if arguments.mode != "sweep":
        for flag in ("processes", "capacity", "slo", "tolerance"):
            given = getattr(arguments, flag)
            if given is not None and given is not False:
                raise ConfigError(
                    f"--{flag}: expected with `preble-jax sim sweep` only, got it with `preble-jax sim`; use sim sweep,"
                    " or leave it out"
                )
        return
    if not arguments.capacity:
        for flag in ("slo", "tolerance"):
            if getattr(arguments, flag) is not None:
                raise ConfigError(
                    f"--{flag}: expected with --capacity only, got it without; add --capacity or leave it out"
                )
        return
    if arguments.rate:
        raise ConfigError(
            f"--rate: expected without --capacity, which looks for it, got {arguments.rate[0]:g}; leave one out"
        )
    for metric in ("ttft", "latency", "tpot"):
        limit_s = getattr(arguments, f"slo_{metric}")
        if limit_s is not None:
            raise ConfigError(
                f"--slo-{metric}: expected without --capacity, whose limit is --slo, got {limit_s:g};"
                f" give --slo {metric}_p99={limit_s:g}"
            )


def scenarios_of(arguments: argparse.Namespace) -> list[Scenario]:
    """Every combination, the seed varying fastest. Raises ConfigError."""
    from preble_jax.sim.scenario import Scenario

    grid = itertools.product(
        sources_of(arguments), arguments.groups, arguments.placement, arguments.queue, arguments.seed
    )
    return [
        Scenario(
            source=source,
            cost=arguments.cost,
            sim=_settings(arguments, num_groups, placement, queue, seed),
        )
        for source, num_groups, placement, queue, seed in grid
    ]


def sources_of(arguments: argparse.Namespace) -> list[Source]:
    from preble_jax.sim.scenario import Source

    if not (arguments.workload or arguments.trace):
        raise ConfigError("expected --workload NAME or --trace FILE, got neither; --list prints the workloads' names")
    if arguments.workload and arguments.trace and arguments.mode != "sweep":
        raise ConfigError("expected --workload NAME or --trace FILE, got both; leave one out, or use sim sweep")
    for flag, paths in (("--trace", arguments.trace), ("--arrivals", (arguments.arrivals,))):
        for path in filter(None, paths):
            if not os.access(path, os.R_OK) or path.is_dir():
                raise ConfigError(f"{flag}: expected a file that can be read, got {path}; check the path")
    if not arguments.trace:
        for flag, given in (
            ("--trace-format", arguments.trace_format is not None),
            ("--block-size", arguments.block_size is not None),
            ("--length-scale", arguments.length_scale != 1.0),
            ("--time-unit", arguments.time_unit is not None),
        ):
            if given:
                raise ConfigError(f"{flag}: expected with --trace only, got it with --workload; leave it out")
    common: dict[str, Any] = {
        "trace_format": arguments.trace_format,
        "num_requests": arguments.requests,
        "duration_s": arguments.duration,
        "block_size": arguments.block_size,
        "length_scale": arguments.length_scale,
        "time_unit": arguments.time_unit,
        "arrivals": str(arguments.arrivals or ""),
    }
    places = [{"workload": name} for name in arguments.workload] + [{"trace": str(path)} for path in arguments.trace]
    rates: Sequence[float | None] = arguments.rate or (None,)
    return [Source(**place, rate=rate, **common) for place in places for rate in rates]


def _settings(
    arguments: argparse.Namespace, num_groups: int, placement: str | None, queue: str | None, seed: int
) -> Any:
    from preble_jax.sim.scenario import make_sim_settings

    overrides = dict(arguments.overrides)
    if placement is not None:
        overrides["sched.placement"] = placement
    if queue is not None:
        overrides["queue.policy"] = queue
    return make_sim_settings(
        load_config(arguments.config, overrides),
        arguments.cost,
        overrides,
        num_groups=num_groups,
        kv_tokens=arguments.kv_tokens,
        prefill_tokens=arguments.prefill_tokens,
        max_num_seqs=arguments.max_num_seqs,
        event_lag_s=arguments.event_lag,
        network_s=arguments.network,
        groups_per_host=arguments.groups_per_host,
        faults=tuple(parse_fault(text) for text in arguments.fault),
        seed=seed,
        horizon_s=arguments.horizon,
    )


def slo_of(arguments: argparse.Namespace) -> Slo:
    from preble_jax.sim.slo import Slo

    return Slo(ttft_s=arguments.slo_ttft, latency_s=arguments.slo_latency, tpot_s=arguments.slo_tpot)


def parse_fault(text: str) -> Fault:
    """ "kill:1@30": group 1 is killed 30 seconds in."""
    from preble_jax.sim.settings import Fault

    kind, _, where = text.partition(":")
    group, _, at_s = where.partition("@")
    try:
        if kind not in FAULTS:
            raise ValueError(kind)
        return Fault(at_s=float(at_s), group=int(group), kind=kind)  # type: ignore[arg-type]
    except ValueError as error:
        raise ConfigError(
            f"--fault: expected KIND:GROUP@SECONDS with a kind of {', '.join(FAULTS)}, for example kill:1@30, "
            f"got {text!r}"
        ) from error
