"""The backends by name, and which one serves a device.

A backend is a module (`kernels_pallas.jnp_attention`) or a package (`kernels_pallas.cpu.attention`,
`kernels_pallas.tpu`, `kernels_pallas.gpu`) with the four functions of `Backend`. All but jnp are imported when they are
first asked for.
"""

from __future__ import annotations

import importlib
import logging
from functools import cache, partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from kernels_pallas.cpu.usable import has_wide_registers, runnable
from kernels_pallas.geometry import Geometry

logger = logging.getLogger(__name__)

# A backend's own pytree of int32 arrays: what a step's lengths mean for its loops. Computed once, used by every layer.
Schedule = Any

_MODULES = {
    "jnp": "kernels_pallas.jnp_attention",
    "cpu": "kernels_pallas.cpu.attention",
    "tpu": "kernels_pallas.tpu",
    "gpu": "kernels_pallas.gpu",
}
BACKENDS = ("jnp", "cpu", "tpu", "gpu", "tpu-interpret", "gpu-interpret")
_HOPPER = "9.0"


class MakeSchedule(Protocol):
    def __call__(
        self,
        cu_q_lens: jax.Array,
        kv_starts: jax.Array,
        kv_lens: jax.Array,
        num_seqs: jax.Array,
        *,
        geometry: Geometry,
    ) -> Schedule: ...


class Attend(Protocol):
    def __call__(
        self,
        q: jax.Array,
        kv_pages: jax.Array,
        page_table: jax.Array,
        cu_q_lens: jax.Array,
        kv_starts: jax.Array,
        kv_lens: jax.Array,
        num_seqs: jax.Array,
        schedule: Schedule,
        *,
        geometry: Geometry,
        causal: bool,
        sm_scale: float,
        sliding_window: int | None,
        soft_cap: float | None,
    ) -> tuple[jax.Array, jax.Array]:
        """q [T, Hq, D] -> out [T, Hq, D] float32 and lse [T, Hq] float32, zeros and -inf where no key is visible.

        Sequence s owns queries cu_q_lens[s] : cu_q_lens[s + 1] and sees keys kv_starts[s] : kv_lens[s], whose pages
        are named by row s of `page_table`; kv_starts are multiples of the page size. causal: its last query sits at
        key kv_lens[s] - 1, a query at p sees keys up to p and, with a window w, only those after p - w. Rows of
        the table from num_seqs[0] on are ignored. soft_cap c: scores become c * tanh(scores / c).

        Products take operands of at least q's dtype and sum in float32; the gpu backend, which has bfloat16 pages
        alone, casts float32 queries to bfloat16.

        What lies in a page outside [kv_starts, kv_lens), NaN too, never reaches a result. Rows of `out` that belong to
        no sequence are undefined but finite.
        """
        ...


class WriteKV(Protocol):
    def __call__(self, kv_pages: jax.Array, k: jax.Array, v: jax.Array, slots: jax.Array) -> jax.Array:
        """k, v [T, Hkv, D], already divided by the pages' scales; slots [T], past the last page: dropped."""
        ...


class Check(Protocol):
    def __call__(self, geometry: Geometry, *, sliding_window: int | None, soft_cap: float | None) -> None:
        """Raises ValueError, naming the limit, for a call that the backend cannot serve. At trace time."""
        ...


class Backend(Protocol):
    """What the common code needs of a backend. `interpret` is bound by `load`.

    It may have a fifth, `merge_rows`, in place of `kernels_pallas.merge.merge_rows`, and a sixth,
    `starting_at(schedule, first_page)`: the schedule for pages that begin further on in the array. Others get a page
    table to which `first_page` was added.
    """

    make_schedule: MakeSchedule
    attend: Attend
    write_kv: WriteKV
    check: Check


class _Interpreted:
    """A Pallas backend run by the interpreter: its functions with `interpret=True`."""

    def __init__(self, module: Any) -> None:
        self.make_schedule: MakeSchedule = module.make_schedule
        self.attend: Attend = partial(module.attend, interpret=True)
        self.write_kv: WriteKV = partial(module.write_kv, interpret=True)
        self.check: Check = module.check


@cache
def load(name: str) -> Backend:
    """The backend called `name`. Raises ValueError for a name that is not in `BACKENDS`."""
    if name not in BACKENDS:
        raise ValueError(f"attention backend: expected one of {', '.join(BACKENDS)}, got {name!r}")
    module: Any = importlib.import_module(_MODULES[name.removesuffix("-interpret")])
    backend: Backend = _Interpreted(module) if name.endswith("-interpret") else module
    return backend


def for_pages(name: str, page_dtype: jnp.dtype) -> Backend:
    """The backend called `name`, or jnp where its kernel cannot read such pages and they lie as jnp's do: "cpu"
    pages that are not bfloat16, "gpu" pages that are int8 or fp8.

    Said once in the log. Raises ValueError for an unknown name.
    """
    dtype = jnp.dtype(page_dtype)
    if (name == "cpu" and dtype != jnp.bfloat16) or (name.startswith("gpu") and dtype.itemsize == 1):
        _log_once(
            logging.WARNING,
            f"attention backend: the {name[:3].upper()} kernel reads bfloat16 pages; {dtype} ones are read by plain "
            "XLA, which is slower",
        )
        return load("jnp")
    return load(name)


def resolve_backend(name: str, device: jax.Device | str) -> str:
    """The backend that serves `device` (or a platform: "cpu", "tpu", "gpu") when the setting is `name`.

    "auto": tpu on TPUs, gpu on Hopper (compute capability 9.0), cpu on CPUs with AVX-512 where its kernels can be
    compiled (on others prompts take twice as long as with jnp), jnp on everything else. The choice is logged once.
    Raises ValueError for a name that is neither "auto" nor a backend's, or a compiled kernel's on another platform.
    """
    platform = device if isinstance(device, str) else device.platform
    kind = platform if isinstance(device, str) else f"{platform} ({device.device_kind})"
    capability = "" if isinstance(device, str) else str(getattr(device, "compute_capability", ""))
    if name not in ("auto", *BACKENDS):
        raise ValueError(f"attention backend: expected auto or one of {', '.join(BACKENDS)}, got {name!r} on {kind}")
    if name in ("cpu", "tpu", "gpu") and platform not in (name, *(("cuda",) if name == "gpu" else ())):
        instead = "auto or jnp" if name == "cpu" else f"auto, jnp, or {name}-interpret for a test"
        raise ValueError(f"attention backend: {name!r} cannot run on {kind}; expected {instead}")
    if name == "cpu" and not runnable():
        raise ValueError("attention backend: 'cpu' cannot run here, as the log says; expected auto or jnp")
    if name == "gpu" and capability not in ("", _HOPPER):
        raise ValueError(
            f"attention backend: 'gpu' is for Hopper (compute capability {_HOPPER}), and {kind} has {capability}; "
            "expected auto or jnp"
        )
    chosen = _automatic(platform, kind, capability) if name == "auto" else name
    _log_once(logging.INFO, f"attention backend: {chosen} on {kind}{'' if name == 'auto' else ', as set'}")
    return chosen


def _automatic(platform: str, kind: str, capability: str) -> str:
    if platform == "tpu":
        return "tpu"
    if platform == "cpu" and runnable() and has_wide_registers():
        return "cpu"
    if platform in ("gpu", "cuda", "rocm"):
        if capability == _HOPPER:
            return "gpu"
        _log_once(
            logging.WARNING,
            f"attention backend: the GPU kernel is for Hopper (compute capability {_HOPPER}), and {kind} has "
            f"{capability or 'an unknown one'}; attention runs as plain XLA there, which is slower",
        )
    return "jnp"


@cache
def _log_once(level: int, message: str) -> None:
    logger.log(level, "%s", message)
