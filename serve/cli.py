"""The command line: `preble-jax COMMAND [--config FILE] [--config.section.key=value ...]`."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from preble_jax.config_files import parse_overrides
from preble_jax.errors import PrebleError
from serve import commands
from serve.sim_arguments import add_plot_arguments, add_sim_arguments

EXIT_ERROR = 2
EXIT_INTERRUPTED = 130


@dataclass(frozen=True)
class _Command:
    """run: gets the parsed arguments, returns the exit status. arguments: adds what only this command takes."""

    run: Callable[[argparse.Namespace], int]
    help: str
    arguments: Callable[[argparse.ArgumentParser], None] = lambda parser: None


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 2 after one clear line for anything the user can mend."""
    try:
        overrides, rest = parse_overrides(sys.argv[1:] if argv is None else argv)
        arguments = _parser().parse_args(rest)
        arguments.overrides = overrides
        _log_to_stderr()
        run: Callable[[argparse.Namespace], int] = arguments.run
        return run(arguments)
    except PrebleError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def _log_to_stderr() -> None:
    """What this project has to say, and the warnings of everybody else."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    for name in ("serve", "preble_jax"):
        logging.getLogger(name).setLevel(logging.INFO)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="preble-jax",
        description="Serves language models, and sends every request to where its prefix is.",
        epilog="Any setting: --config.section.key=value, for example --config.kv.page_size=32 "
        "(preble_jax/config.py lists them).",
        allow_abbrev=False,
    )
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, command in _COMMANDS.items():
        sub = subparsers.add_parser(name, help=command.help, description=command.help, allow_abbrev=False)
        sub.set_defaults(run=command.run)
        sub.add_argument("--config", metavar="FILE", help="a config file, or the name of a shipped one (local)")
        command.arguments(sub)
    return parser


def _process_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--port", type=int, help="listen here instead of on the configured port; 0: any free one")
    parser.add_argument("--address-file", type=Path, metavar="FILE", help="write host:port here when listening")
    parser.add_argument("--exit-with-parent", action="store_true", help="stop when standard input ends")


def _linked_arguments(parser: argparse.ArgumentParser) -> None:
    _process_arguments(parser)
    parser.add_argument("--scheduler", metavar="HOST:PORT", help="the scheduler; default: the configured address")


def _worker_arguments(parser: argparse.ArgumentParser) -> None:
    _linked_arguments(parser)
    parser.add_argument("--group", default="worker-0", help="name of the device group, unique in the deployment")
    parser.add_argument("--cores", type=_cores, metavar="0,1", help="CPU cores to stay on")


def _cores(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers with commas between them, got {text!r}") from None


def _serve_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run-dir", type=Path, metavar="FOLDER", help="folder for the logs")


def _demo_arguments(parser: argparse.ArgumentParser) -> None:
    _serve_arguments(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the summary here")
    parser.add_argument("--compare", action="store_true", help="also run round robin, from empty caches")
    parser.add_argument("--seed", type=int, default=0, help="of the order in which requests are sent")
    parser.add_argument("--max-tokens", type=int, default=32, help="output tokens a request")


def _chat_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--address", metavar="HOST:PORT", help="the frontend; default: the configured address")
    parser.add_argument("--system", default="", metavar="TEXT", help="system message")
    parser.add_argument("--max-tokens", type=int, default=256, help="output tokens an answer")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: always the most likely token")


def _profile_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the costs here, for sched.cost_file")
    parser.add_argument("--cores", type=_cores, metavar="0,1", help="CPU cores to stay on; default: a worker's")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each kind; the median counts")
    beside = "other groups of this machine beside which steps are measured, too; default: all that the deployment has"
    parser.add_argument("--neighbours", type=int, metavar="N", help=beside)


def _bench_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=["engine"], help="engine: one device group in this process, without a network")
    workloads = "names (docs/performance.md lists them) or .json files; default: all that have names"
    parser.add_argument("workloads", nargs="*", metavar="WORKLOAD", help=workloads)
    parser.add_argument("--seed", type=int, default=0, help="of the named workloads' prompts")
    parser.add_argument("--rounds", type=int, default=3, help="of each workload, from an empty prefix cache")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured here")


def _fetch_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", help="default: the configured model")


_COMMANDS: Mapping[str, _Command] = {
    "serve": _Command(commands.serve, "Run a whole cluster on this machine until Ctrl-C.", _serve_arguments),
    "demo": _Command(commands.demo, "Start a cluster, send it 24 requests, show what happened.", _demo_arguments),
    "chat": _Command(commands.chat, "Talk to a running cluster.", _chat_arguments),
    "profile": _Command(commands.profile, "Measure what work costs on this machine.", _profile_arguments),
    "bench": _Command(commands.bench, "Measure an engine's speed on this machine.", _bench_arguments),
    "sim": _Command(commands.sim, "Simulate a cluster under a workload or a trace.", add_sim_arguments),
    "plot": _Command(commands.plot, "Draw what `sim` and `sim sweep` have written.", add_plot_arguments),
    "compile": _Command(commands.compile_programs, "Compile a deployment's programs, so that it starts faster."),
    "fetch": _Command(commands.fetch, "Fetch a model and print where it is.", _fetch_arguments),
    "scheduler": _Command(commands.scheduler, "Run a global scheduler.", _process_arguments),
    "worker": _Command(commands.worker, "Run the worker of one device group.", _worker_arguments),
    "frontend": _Command(commands.frontend, "Run a frontend.", _linked_arguments),
}


if __name__ == "__main__":
    sys.exit(main())
