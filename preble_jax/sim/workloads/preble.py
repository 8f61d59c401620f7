"""Preble's five workloads (arXiv 2407.00023): Table 1, and the prefixes, sessions and durations of its released
configurations (github.com/WukLab/preble, benchmarks/multi_exp_configs)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from preble_jax.sim.workloads.arrivals import Renewal
from preble_jax.sim.workloads.lengths import Lengths
from preble_jax.sim.workloads.shape import Client, Recipe, Shape, rest


@dataclass(frozen=True, kw_only=True)
class Published:
    """Table 1. shared: share of the prompt tokens that a cache without bound would hold; here it comes out when every
    prefix (every conversation has turns instead) is used `uses` times."""

    prompt: Lengths
    output: Lengths
    shared: float
    uses: float


TABLE_1: Mapping[str, Published] = MappingProxyType(
    {
        "toolbench": Published(prompt=Lengths(mean=1835, sd=742), output=Lengths(mean=43, sd=16), shared=0.85, uses=39),
        "agent": Published(prompt=Lengths(mean=2285, sd=471), output=Lengths(mean=16, sd=13), shared=0.97, uses=48),
        # 126 uses of a key portion in the paper; the configurations have at most 3,755 requests for 160 problems.
        "programming": Published(
            prompt=Lengths(mean=3871, sd=1656), output=Lengths(mean=190, sd=343), shared=0.97, uses=20
        ),
        "video": Published(prompt=Lengths(mean=9865, sd=5976), output=Lengths(mean=4, sd=1.5), shared=0.88, uses=8.6),
        # 18 uses in the paper, with which questions of a sentence would share 94%; the released data has 12 a document.
        "loogle": Published(
            prompt=Lengths(mean=23474, sd=6105), output=Lengths(mean=16, sd=9.9), shared=0.91, uses=11.5
        ),
    }
)


def _shape(name: str, *, system: int, question: Lengths, num_prefixes: float) -> Shape:
    published = TABLE_1[name]
    return Shape(
        output=published.output,
        question=question,
        system=system,
        prefix=rest(published.prompt, system=system, question=question),
        num_prefixes=num_prefixes,
    )


# The instructions all calls share, the descriptions of the tools, the user's query and the steps so far.
TOOLBENCH = _shape("toolbench", system=352, question=Lengths(mean=244, sd=200, low=16), num_prefixes=200)
TOOLBENCH_ZIPF = replace(TOOLBENCH, num_prefixes=320, zipf=1.1)
# Every task has a prompt of its own and grows by an action and an observation a step; steps wait for the one before.
AGENT = Shape(
    output=TABLE_1["agent"].output,
    question=Lengths(mean=15, sd=12),
    opening=Lengths(mean=1535, sd=80, low=1024),
    turns=Lengths(mean=48, sd=8, low=16),
    num_lanes=200,
)
# The same examples before every problem; a problem is tried many times.
PROGRAMMING = _shape("programming", system=2336, question=Lengths(mean=39, sd=6, low=16), num_prefixes=160)
VIDEO = _shape("video", system=32, question=Lengths(mean=56, sd=16, low=16), num_prefixes=150)
LOOGLE = _shape("loogle", system=32, question=Lengths(mean=60, sd=20, low=16), num_prefixes=24)

# Azure's conversation trace: gaps of variation 1.09, and a rate that varies by 22% from minute to minute.
AZURE_LIKE = Renewal(cv=1.1, phases=((60, 1.0), (60, 1.27), (60, 0.8), (60, 1.3), (60, 0.68), (60, 0.95)))

RECIPES = (
    Recipe(
        name="toolbench",
        models="calls of tools; the tools' descriptions are shared",
        clients=(Client(shape=TOOLBENCH),),
    ),
    Recipe(
        name="toolbench_zipf",
        models="toolbench with prefixes of Zipf popularity (1.1)",
        clients=(Client(shape=TOOLBENCH_ZIPF),),
    ),
    Recipe(
        name="agent",
        models="embodied agents; each step has all steps before it in its prompt and waits for them",
        clients=(Client(shape=AGENT),),
    ),
    Recipe(
        name="programming",
        models="many tries at each of a set of problems; long examples before all of them",
        clients=(Client(shape=PROGRAMMING),),
        duration_s=625.0,
    ),
    Recipe(
        name="video",
        models="questions on videos; hardly any output",
        clients=(Client(shape=VIDEO),),
    ),
    Recipe(
        name="video_8k",
        models="video with prefixes cut at 8,192 tokens, as in the released configuration",
        clients=(Client(shape=replace(VIDEO, max_prefix=8192)),),
    ),
    Recipe(
        name="loogle",
        models="questions on long documents",
        clients=(Client(shape=LOOGLE),),
        duration_s=560.0,
    ),
    Recipe(
        name="mixed",
        models="all five together, by their highest published rates, on arrivals like Azure's",
        clients=(
            Client(shape=TOOLBENCH, share=18),
            Client(shape=AGENT, share=18),
            Client(shape=PROGRAMMING, share=6),
            Client(shape=VIDEO, share=7),
            Client(shape=LOOGLE, share=1.2),
        ),
        together=AZURE_LIKE,
    ),
    Recipe(
        name="preble_mix",
        models="toolbench and video, 4 to 1, on arrivals like Azure's (Figure 4)",
        clients=(Client(shape=TOOLBENCH, share=4), Client(shape=replace(VIDEO, max_prefix=8192), share=1)),
        together=AZURE_LIKE,
    ),
)
