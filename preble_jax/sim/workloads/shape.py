"""What a workload's requests look like: descriptions, from which `build` draws them."""

from __future__ import annotations

from dataclasses import dataclass, field

from preble_jax.errors import ConfigError
from preble_jax.sim.workloads.arrivals import Arrivals, Renewal
from preble_jax.sim.workloads.lengths import Lengths


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A prompt is `system` (the same for all), a prefix that many requests have (tools, a document), the conversation
    so far, and a question of its own. Counts "for two groups" grow with the cluster. All lengths in tokens.

    question: nobody else's (but later turns of the conversation have it before them).
    prefix, num_prefixes: how long they are and how many, for two groups; max_prefix: longer ones are cut, unless 0.
    zipf: popularity of the k-th prefix is k^-zipf; 0 makes them equal. hot: share of the requests that have the most
    popular one in any case. num_epochs: so many parts of the run have popularities of their own.
    turns: requests of a conversation; None: each request stands alone. opening: its beginning, nobody else's.
    think_s: mean seconds from an answer to the next turn (exponential), when conversations begin at the arrivals.
    num_lanes: if not 0, so many conversations are under way at any time, for two groups, and the arrivals are those of
    requests, each the next turn of one of them, in turn. max_prompt: a conversation ends before it gets longer.
    """

    output: Lengths
    question: Lengths
    system: int = 0
    prefix: Lengths | None = None
    num_prefixes: float = 0
    max_prefix: int = 0
    zipf: float = 0.0
    hot: float = 0.0
    num_epochs: int = 1
    turns: Lengths | None = None
    opening: Lengths | None = None
    think_s: float = 0.0
    num_lanes: float = 0
    max_prompt: int = 0

    def __post_init__(self) -> None:
        if (self.prefix is None) != (self.num_prefixes == 0):
            raise ConfigError(f"shape: expected prefix and num_prefixes both or neither, got {self}; give both")
        if self.turns is None and (self.think_s or self.num_lanes or self.opening):
            raise ConfigError(f"shape: expected turns with think_s, num_lanes or opening, got {self}; give the turns")

    @property
    def turns_per_arrival(self) -> float:
        return self.turns.mean if self.turns and not self.num_lanes else 1.0


def rest(prompt: Lengths, *, system: int, question: Lengths) -> Lengths:
    """Length of the prefixes with which prompts of these parts have the mean and sd of `prompt`."""
    mean = prompt.mean - system - question.mean
    variance = prompt.sd**2 - question.sd**2
    if mean < 1 or variance < 0:
        raise ConfigError(f"shape: expected a system prompt and question shorter than the prompt, got {prompt}")
    return Lengths(mean=mean, sd=variance**0.5, low=min(64, int(mean)))


@dataclass(frozen=True, kw_only=True)
class Client:
    """Who sends requests of one shape. share: of the workload's rate, in proportion. arrivals: its own. pool: clients
    that name the same one have its system prompt and prefixes in common (the first one's shape says which)."""

    shape: Shape
    tenant: str = "default"
    share: float = 1.0
    pool: str = ""
    arrivals: Arrivals = field(default_factory=Renewal)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A workload by name. models: what it stands for. duration_s: of the original run, for when nobody says how long.
    together: arrivals of all clients as one stream, dealt to them by share; None: each has its own."""

    name: str
    models: str
    clients: tuple[Client, ...]
    duration_s: float = 300.0
    together: Arrivals | None = None
    block_size: int = 16
