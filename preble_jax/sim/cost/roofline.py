"""A step's time from what it has to compute and to read: the chip's peak rates, less what is never reached.

seconds = fixed + max(products, reading weights) + max(attention's products, reading keys and values) + collectives.
Weights and unique keys and values are read once a step (prefixes that sequences share once for all of them).
"""

from __future__ import annotations

from dataclasses import dataclass

from preble_jax.sim.cost.base import EngineShape, StepWork

WEIGHT_BYTES = KV_BYTES = 2  # bfloat16


@dataclass(frozen=True, kw_only=True)
class Chip:
    """Peak rates of one chip, bfloat16. link_bytes_per_s: to its neighbours, one direction, all links together."""

    flops: float
    hbm_bytes_per_s: float
    hbm_bytes: float
    link_bytes_per_s: float


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A decoder with gated feed-forward layers and grouped key heads; embedding and output matrix are two."""

    num_layers: int
    hidden: int
    intermediate: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab: int

    @property
    def layer_weights(self) -> int:
        """Of all layers: attention's four matrices, the feed-forward's three."""
        heads = self.num_heads + self.num_kv_heads
        return self.num_layers * self.hidden * (2 * heads * self.head_dim + 3 * self.intermediate)

    @property
    def output_weights(self) -> int:
        return self.hidden * self.vocab

    @property
    def kv_bytes(self) -> int:
        """Of one token."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * KV_BYTES

    @property
    def attention_flops(self) -> int:
        """Of one query token and one key token."""
        return 4 * self.num_layers * self.num_heads * self.head_dim


@dataclass(frozen=True, kw_only=True)
class Efficiency:
    """Shares of the peak rates that are reached. memory: of the HBM, for weights and pages. step_s: fixed cost of a
    step (dispatch, sampling). collective_s: latency of one all-reduce, of which a layer has two."""

    flops: float
    attention_flops: float
    hbm: float
    link: float
    memory: float
    step_s: float
    collective_s: float


class Roofline:
    """One device group: `num_chips` chips that split the model's heads and columns evenly."""

    def __init__(
        self,
        *,
        name: str,
        model: ModelShape,
        chip: Chip,
        num_chips: int,
        efficiency: Efficiency,
        prefill_tokens: int,
        max_prefill_seqs: int,
        max_num_seqs: int,
    ) -> None:
        self.name = name
        weights = WEIGHT_BYTES * (model.layer_weights + 2 * model.output_weights)
        room = efficiency.memory * num_chips * chip.hbm_bytes - weights
        self.engine = EngineShape(
            prefill_tokens=prefill_tokens,
            max_prefill_seqs=max_prefill_seqs,
            max_num_seqs=max_num_seqs,
            kv_tokens=max(0, int(room / model.kv_bytes)),
        )
        flops, read = num_chips * chip.flops, num_chips * chip.hbm_bytes_per_s * efficiency.hbm
        self._token_s = 2 * model.layer_weights / (flops * efficiency.flops)
        self._output_s = 2 * model.output_weights / (flops * efficiency.flops)
        self._weights_s = WEIGHT_BYTES * (model.layer_weights + model.output_weights) / read
        self._pair_s = model.attention_flops / (flops * efficiency.attention_flops)
        self._context_s = model.kv_bytes / read
        self._fixed_s, self._exchange_s = efficiency.step_s, 0.0
        if num_chips > 1:  # an all-reduce moves 2 (n - 1) / n of its bytes over each chip's links
            self._fixed_s += 2 * model.num_layers * efficiency.collective_s
            moved = 2 * model.num_layers * model.hidden * 2 * 2 * (num_chips - 1) / num_chips
            self._exchange_s = moved / (chip.link_bytes_per_s * efficiency.link)

    def step_s(self, work: StepWork) -> float:
        num_tokens, context, pairs = work.num_decode, work.decode_context, float(work.decode_context)
        for extend, length in work.chunks:
            num_tokens += extend
            context += length
            pairs += extend * (length - (extend - 1) / 2)  # causal
        read = min(context, work.unique_context) if work.unique_context else context
        products_s = self._token_s * num_tokens + self._output_s * (work.num_decode + len(work.chunks))
        return (
            self._fixed_s
            + max(products_s, self._weights_s)
            + max(self._pair_s * pairs, self._context_s * read)
            + self._exchange_s * num_tokens
        )
