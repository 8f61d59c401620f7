"""Workloads of several tenants: the sets of VTC (arXiv 2401.00588, its artifact's suite), those of D2LPM (arXiv
2501.14312), and our own."""

from __future__ import annotations

from dataclasses import replace

from preble_jax.sim.workloads.arrivals import Renewal
from preble_jax.sim.workloads.lengths import Lengths
from preble_jax.sim.workloads.preble import TOOLBENCH
from preble_jax.sim.workloads.shape import Client, Recipe, Shape

_EVEN = Renewal(cv=0.0)
_ON_OFF = ((60.0, 1.0), (60.0, 0.0))


def _plain(num_prompt: int, num_output: int) -> Shape:
    """Prompts and answers of one length, nothing shared: VTC's."""
    return Shape(question=Lengths(mean=num_prompt), output=Lengths(mean=num_output))


def _vtc(name: str, models: str, *rates: float, shape: Shape | None = None, duration_s: float = 600.0) -> Recipe:
    """Clients with these requests a second, in even gaps."""
    return _set(
        name,
        models,
        *(Client(shape=shape or _plain(256, 256), share=rate, arrivals=_EVEN) for rate in rates),
        duration_s=duration_s,
    )


def _set(name: str, models: str, *clients: Client, duration_s: float = 600.0) -> Recipe:
    """The clients as tenants client-0, client-1, ..."""
    named = tuple(replace(client, tenant=f"client-{index}") for index, client in enumerate(clients))
    return Recipe(name=name, models=models, clients=named, duration_s=duration_s)


def _client(shape: Shape, rate: float, *phases: tuple[float, float], cv: float = 0.0) -> Client:
    """rate: requests a second in the mean of all phases."""
    return Client(shape=shape, share=rate, arrivals=Renewal(cv=cv, phases=phases))


_RAMP = tuple((60.0, 0.2 + 1.8 * (step + 0.5) / 10) for step in range(10))
_VARIED = Shape(
    question=Lengths(mean=264, sd=143, low=16, high=512), output=Lengths(mean=264, sd=143, low=16, high=512)
)

# D2LPM: trees as of a judge that looks at one text from several sides. Its text does not give every length; these are
# ours: eight clients, S1: one sends eight times as much; S2: one has prefixes four times as long.
_TREE = Shape(
    question=Lengths(mean=64, sd=24, low=16),
    output=Lengths(mean=128, sd=64),
    system=128,
    prefix=Lengths(mean=1024, sd=256, low=128),
    num_prefixes=16,
)
_LONG_TREE = replace(_TREE, prefix=Lengths(mean=4096, sd=1024, low=512))

_LOOSE = Shape(question=Lengths(mean=3000, sd=1500, low=64), output=Lengths(mean=64, sd=32))

RECIPES = (
    _set(
        "d2lpm_s1",
        "eight clients with prefixes of their own; one sends eight times as much as each other",
        Client(shape=_TREE, share=8),
        *(Client(shape=_TREE) for _ in range(7)),
        duration_s=300.0,
    ),
    _set(
        "d2lpm_s2",
        "eight clients with prefixes of their own; one's are four times as long",
        Client(shape=_LONG_TREE),
        *(Client(shape=_TREE) for _ in range(7)),
        duration_s=300.0,
    ),
    _vtc("vtc_overload", "two clients beyond capacity, one sends twice as much", 1.5, 3.0, duration_s=360.0),
    _vtc("vtc_overload_multi", "eight clients beyond capacity", *[0.4] * 3, *[0.6] * 5, duration_s=360.0),
    _vtc("vtc_weighted", "four clients, for weights 1 to 4 in the settings", 0.8, 0.8, 1.2, 1.6, duration_s=360.0),
    _vtc("vtc_proportional", "three clients, two of them below their share", 0.25, 0.5, 1.5),
    _set(
        "vtc_increase",
        "a steady client beside one whose rate grows tenfold",
        _client(_plain(256, 256), 0.5),
        _client(_plain(256, 256), 1.1, *_RAMP),
    ),
    _set(
        "vtc_on_off",
        "a client that sends every other minute, below its share, beside a steady one beyond it",
        _client(_plain(256, 256), 0.25, *_ON_OFF),
        _client(_plain(256, 256), 2.0),
    ),
    _set(
        "vtc_on_off_overload",
        "a client that sends every other minute, beyond its share, beside a steady one beyond it",
        _client(_plain(256, 256), 1.0, *_ON_OFF),
        _client(_plain(256, 256), 3.0),
    ),
    _set(
        "vtc_poisson_on_off",
        "as vtc_on_off, at Poisson times and with lengths of 16 to 512",
        _client(_VARIED, 0.25, *_ON_OFF, cv=1.0),
        _client(_VARIED, 2.0, cv=1.0),
    ),
    _set(
        "vtc_short_long",
        "many short requests beside few long ones, Poisson",
        _client(_plain(64, 64), 8.0, cv=1.0),
        _client(_plain(256, 256), 1.5, cv=1.0),
    ),
    _set(
        "vtc_in_out",
        "a client with long prompts beside one with long answers, Poisson",
        _client(_plain(512, 32), 8.0, cv=1.0),
        _client(_plain(32, 512), 1.5, cv=1.0),
    ),
    _set(
        "vtc_shift",
        "two clients whose rates change in thirds of 15 minutes: on and off, both beyond their share, in proportion",
        _client(_plain(256, 256), 0.6, *(*_ON_OFF, *_ON_OFF, (60, 1.0), (300, 2.0), (300, 1.0))),
        _client(_plain(256, 256), 1.5, (300, 2.0), (300, 1.0), (300, 1.5)),
        duration_s=900.0,
    ),
    _set(
        "noisy_tenant",
        "seven well-behaved clients of tools, and one with half of the requests, long and unshared, every other minute",
        Client(shape=_LOOSE, share=7, arrivals=Renewal(phases=_ON_OFF)),
        *(Client(shape=replace(TOOLBENCH, num_prefixes=28)) for _ in range(7)),
    ),
    _set(
        "shared_tools",
        "eight clients of Zipf rates with the same tools: a prefix is everybody's",
        *(Client(shape=TOOLBENCH, share=1 / (rank + 1), pool="tools") for rank in range(8)),
    ),
)
