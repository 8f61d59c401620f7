"""Memory of the forest per cached page: what a fresh process grows by while groups report their pages.

No requests, no window: only what KV events leave behind. Hashes are made as they are stored, so that each exists once;
the process prints one line of JSON. `measure` starts it.

    python benchmarks/forest_memory.py --groups 64 --pages 1000000
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
from pathlib import Path

from toolbench import GROUP_PAGES, PAGE_SIZE, chain, tools

from preble_jax.config import SchedSettings
from preble_jax.kv.events import BlocksStored, EventBatch
from preble_jax.sched import GlobalScheduler

REQUESTS_A_MOVE = 8  # of one tool on one group, before the next group serves it too


def measure(num_groups: int, num_pages: int) -> dict[str, float]:
    """{"bytes_a_page", "pages", "held_pages"}: held counts a page once for each group that has it."""
    command = [sys.executable, __file__, "--groups", str(num_groups), "--pages", str(num_pages)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    result: dict[str, float] = json.loads(done.stdout)
    return result


def fill(num_groups: int, num_pages: int) -> GlobalScheduler:
    scheduler = GlobalScheduler(SchedSettings(max_forest_blocks=10 * num_pages), PAGE_SIZE)
    for index in range(num_groups):
        scheduler.add_group(str(index), GROUP_PAGES, 1, 0.0)
    next_seq = [0] * num_groups
    served: dict[int, int] = {}
    for request, tool in enumerate(tools(num_pages // 16)):
        number = served[tool] = served.get(tool, -1) + 1
        group = (tool * 7 + number // REQUESTS_A_MOVE) % num_groups
        batch = EventBatch(1, next_seq[group], (BlocksStored(chain(tool, request), None),))
        next_seq[group] += 1
        scheduler.kv_events(str(group), batch, 0.0)
        if scheduler.num_blocks >= num_pages:
            break
    return scheduler


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--groups", type=int, default=64)
    parser.add_argument("--pages", type=int, default=1_000_000)
    arguments = parser.parse_args()
    fill(4, 2_000)  # what is allocated once
    gc.collect()
    before = resident_bytes()
    scheduler = fill(arguments.groups, arguments.pages)
    gc.collect()
    grown = resident_bytes() - before
    held = sum(stats.held_pages for stats in scheduler.stats().values())
    result = {"bytes_a_page": grown / scheduler.num_blocks, "pages": scheduler.num_blocks, "held_pages": held}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
