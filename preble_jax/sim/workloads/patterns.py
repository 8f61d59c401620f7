"""Workloads with one trait each: no sharing, skew, one hot prefix, moving popularity, bursts, conversations."""

from __future__ import annotations

from dataclasses import replace

from preble_jax.sim.workloads.arrivals import Renewal
from preble_jax.sim.workloads.lengths import Lengths
from preble_jax.sim.workloads.preble import TOOLBENCH
from preble_jax.sim.workloads.shape import Client, Recipe, Shape

_ANSWERS = replace(TOOLBENCH, output=Lengths(mean=128, sd=96))
_UNSHARED = Shape(output=_ANSWERS.output, question=Lengths(mean=1835, sd=742, low=32))
# Azure's conversation trace has means of 1,155 prompt and 211 output tokens.
_CHAT = Shape(
    output=Lengths(mean=211, sd=163),
    question=Lengths(mean=80, sd=100, low=4),
    system=320,
    turns=Lengths(mean=5, sd=4, high=40),
    think_s=15.0,
    max_prompt=16384,
)
# Assistants with system prompts of their own, of which some are far more popular.
_ASSISTANTS = replace(_CHAT, system=0, prefix=Lengths(mean=1200, sd=600, low=64), num_prefixes=100, zipf=1.0)


def _recipe(name: str, models: str, shape: Shape, arrivals: Renewal | None = None) -> Recipe:
    return Recipe(name=name, models=models, clients=(Client(shape=shape, arrivals=arrivals or Renewal()),))


RECIPES = (
    _recipe("unshared", "prompts with nothing in common", _UNSHARED),
    _recipe("zipf", "400 prefixes of Zipf popularity (1.1)", replace(_ANSWERS, num_prefixes=400, zipf=1.1)),
    _recipe("zipf_steep", "400 prefixes of Zipf popularity (1.6)", replace(_ANSWERS, num_prefixes=400, zipf=1.6)),
    _recipe("hot_prefix", "one prefix has 70% of the requests", replace(_ANSWERS, num_prefixes=200, hot=0.7)),
    _recipe(
        "shift",
        "Zipf popularity (1.1) that changes to other prefixes five times in the run",
        replace(_ANSWERS, num_prefixes=400, zipf=1.1, num_epochs=6),
    ),
    _recipe(
        "burst",
        "toolbench in bursts: a tenth of the time at five times the rate, gaps of variation 2",
        TOOLBENCH,
        Renewal(cv=2.0, phases=((27, 0.5556), (3, 5.0))),
    ),
    _recipe("chat", "conversations of several turns behind one system prompt", _CHAT),
    _recipe("assistants", "conversations behind system prompts of Zipf popularity (1.0)", _ASSISTANTS),
)
