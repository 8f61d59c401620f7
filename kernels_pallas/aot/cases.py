"""Programs to compile: the public attention calls at a model's shapes, as an engine's step would make them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from kernels_pallas.aot.report import CompileReport
from kernels_pallas.aot.topology import TpuTopology
from kernels_pallas.api import paged_attention, write_kv
from kernels_pallas.families import SharedPrefixes
from kernels_pallas.layout import PageLayout

BACKEND = "tpu"
HEADS_AXIS = "tensor"

# Models by their attention: query heads, key heads, head dim and, where they have them, window and soft cap.
PRESETS: dict[str, dict[str, Any]] = {
    "llama-3-8b": {"num_q_heads": 32, "num_kv_heads": 8, "head_dim": 128},
    "llama-3-70b": {"num_q_heads": 64, "num_kv_heads": 8, "head_dim": 128},
    "head-dim-64": {"num_q_heads": 32, "num_kv_heads": 8, "head_dim": 64},  # Llama-3.2-1B
    "smollm2": {"num_q_heads": 9, "num_kv_heads": 3, "head_dim": 64},
    "gemma-2-9b": {"num_q_heads": 16, "num_kv_heads": 8, "head_dim": 256, "sliding_window": 4096, "soft_cap": 50.0},
}

VARIANTS = {
    "decode": "one new token for every sequence",
    "prefill": "step_tokens of prompt chunks, any of the sequences",
    "mixed": "half of the sequences decode, step_tokens of chunks for the others",
    "family": "decode whose sequences share cached pages: own keys, shared keys, merge",
    "write": "step_tokens of new keys and values into donated pages",
    "layer": "write, then mixed attention, over the same donated pages",
}

_DTYPES = {"bfloat16": jnp.bfloat16, "float32": jnp.float32, "int8": jnp.int8, "fp8": jnp.float8_e4m3fn}
PAGE_DTYPES = tuple(_DTYPES)
Q_DTYPES = ("bfloat16", "float32")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One program. `context` is the longest sequence in tokens; `page_bytes` what one layer's page array takes at most.

    tensor: devices over which the heads are split. Raises ValueError for sizes that do not fit together; what the
    kernel itself cannot serve it says when it is traced.
    """

    name: str
    variant: str
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int = 128
    num_seqs: int = 256
    context: int = 8192
    step_tokens: int = 2048
    page_dtype: str = "bfloat16"
    q_dtype: str = "bfloat16"
    page_bytes: int = 1 << 30
    sliding_window: int | None = None
    soft_cap: float | None = None
    tensor: int = 1

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("variant", self.variant, VARIANTS),
            ("page_dtype", self.page_dtype, PAGE_DTYPES),
            ("q_dtype", self.q_dtype, Q_DTYPES),
        ):
            if value not in allowed:
                raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {value!r}")
        for name in ("num_seqs", "context", "step_tokens", "page_bytes", "tensor"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.num_kv_heads % self.tensor:
            raise ValueError(
                f"tensor: expected a divisor of the {self.num_kv_heads} key heads, got {self.tensor}; every device "
                f"holds whole heads"
            )

    @property
    def pages_per_seq(self) -> int:
        return -(-self.context // self.page_size)

    @property
    def layout(self) -> PageLayout:
        """Pages for all sequences at full length, or as many as `page_bytes` holds."""
        sizes: dict[str, Any] = {
            "page_size": self.page_size,
            "num_kv_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "dtype": jnp.dtype(_DTYPES[self.page_dtype]),
            "backend": BACKEND,
        }
        most = self.page_bytes // PageLayout(num_pages=1, **sizes).page_bytes
        return PageLayout(num_pages=max(1, min(self.num_seqs * self.pages_per_seq, most)), **sizes)

    @property
    def page_array_bytes(self) -> int:
        """Of one device."""
        return self.layout.page_bytes * self.layout.num_pages // self.tensor

    @property
    def num_decode_slots(self) -> int:
        return {"decode": self.num_seqs, "family": self.num_seqs, "prefill": 0}.get(self.variant, self.num_seqs // 2)

    @property
    def num_tokens(self) -> int:
        return self.num_decode_slots + (0 if self.num_decode_slots == self.num_seqs else self.step_tokens)

    def compile(self, topology: TpuTopology) -> CompileReport:
        """The case as the compiler for `topology` sees it. Raises what tracing and `TpuTopology.compile` raise."""
        arguments = self._arguments()
        specs = [spec for _, spec in arguments.values()]
        mesh = topology.mesh({HEADS_AXIS: self.tensor}) if self.tensor > 1 else None
        program = self._program(tuple(arguments))
        if mesh is not None:
            program = _over_heads(program, mesh, specs, self._output_specs())
        donated = (list(arguments).index("kv_pages"),) if self.variant in ("write", "layer") else ()
        return topology.compile(
            program, *(value for value, _ in arguments.values()), mesh=mesh, specs=specs, donate_argnums=donated
        )

    def _arguments(self) -> dict[str, tuple[Any, P]]:
        """Name -> shapes and how a mesh splits them, of everything that the variant reads."""

        def array(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, dtype)

        layout, q_dtype = self.layout, _DTYPES[self.q_dtype]
        heads, replicated = P(None, HEADS_AXIS), P()
        found: dict[str, tuple[Any, P]] = {"kv_pages": (array(layout.storage_dtype, *layout.shape), heads)}
        if layout.dtype.itemsize == 1:
            found["kv_scales"] = (array(jnp.float32, 2, self.num_kv_heads), heads)
        if self.variant in ("write", "layer"):
            num_new = self.step_tokens if self.variant == "write" else self.num_tokens
            for name in ("k", "v"):
                found[name] = (array(q_dtype, num_new, self.num_kv_heads, self.head_dim), heads)
            found["slots"] = (array(jnp.int32, num_new), replicated)
        if self.variant != "write":
            found["q"] = (array(q_dtype, self.num_tokens, self.num_q_heads, self.head_dim), heads)
            found["page_table"] = (array(jnp.int32, self.num_seqs, self.pages_per_seq), replicated)
            found["cu_q_lens"] = (array(jnp.int32, self.num_seqs + 1), replicated)
            found["kv_lens"] = (array(jnp.int32, self.num_seqs), replicated)
            found["num_seqs"] = (array(jnp.int32, 1), replicated)
        if self.variant == "family":
            found["shared"] = (SharedPrefixes.empty(num_tokens=self.num_tokens, num_seqs=self.num_seqs), replicated)
        return found

    def _output_specs(self) -> Any:
        heads = P(None, HEADS_AXIS)
        return {"write": heads, "layer": (heads, heads)}.get(self.variant, heads)

    def _program(self, names: tuple[str, ...]) -> Callable[..., Any]:
        def program(*values: Any) -> Any:
            given = dict(zip(names, values, strict=True))
            scales = given.pop("kv_scales", None)
            if self.variant in ("write", "layer"):
                new = [given.pop(name) for name in ("k", "v", "slots")]
                given["kv_pages"] = write_kv(given["kv_pages"], *new, kv_scales=scales, backend=BACKEND)
            if self.variant == "write":
                return given["kv_pages"]
            out = paged_attention(
                **given,
                num_decode_slots=self.num_decode_slots,
                sliding_window=None if self.variant == "family" else self.sliding_window,
                soft_cap=self.soft_cap,
                kv_scales=scales,
                backend=BACKEND,
            )
            return (given["kv_pages"], out) if self.variant == "layer" else out

        return program


def _over_heads(program: Callable[..., Any], mesh: Mesh, in_specs: list[P], out_specs: Any) -> Callable[..., Any]:
    """Each device does its own heads; nothing is communicated."""
    return jax.shard_map(program, mesh=mesh, in_specs=tuple(in_specs), out_specs=out_specs, check_vma=False)
