"""Rooflines: what bounds a step, by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from preble_jax.sim.cost import StepWork, find_cost
from preble_jax.sim.cost.roofline import Chip, Efficiency, ModelShape, Roofline

MODEL = ModelShape(num_layers=2, hidden=8, intermediate=16, num_heads=4, num_kv_heads=2, head_dim=4, vocab=100)
CHIP = Chip(flops=1e6, hbm_bytes_per_s=1e4, hbm_bytes=20_000, link_bytes_per_s=1e3)
IDEAL = Efficiency(flops=1, attention_flops=1, hbm=1, link=1, memory=1, step_s=0.5, collective_s=0.25)
LAYERS = 2 * (2 * 8 * 16 + 2 * 8 * 8 + 3 * 8 * 16)  # queries and output, keys and values, feed-forward
WEIGHTS_S = 2 * (LAYERS + 800) / 1e4


def roofline(model: ModelShape = MODEL, num_chips: int = 1, efficiency: Efficiency = IDEAL) -> Roofline:
    return Roofline(
        name="toy",
        model=model,
        chip=CHIP,
        num_chips=num_chips,
        efficiency=efficiency,
        prefill_tokens=64,
        max_prefill_seqs=4,
        max_num_seqs=16,
    )


def test_room_for_keys_is_what_the_weights_leave() -> None:
    assert MODEL.layer_weights == LAYERS
    assert MODEL.kv_bytes == 2 * 2 * 2 * 4 * 2
    assert roofline().engine.kv_tokens == (20_000 - 2 * (LAYERS + 1600)) // 64
    assert roofline(replace(MODEL, num_layers=20)).engine.kv_tokens == 0, "the model alone does not fit"


def test_decoding_reads_the_weights_once() -> None:
    one = roofline().step_s(StepWork(1, 100, (), 100))
    assert one == pytest.approx(0.5 + WEIGHTS_S + 100 * 64 / 1e4)
    assert roofline().step_s(StepWork(10, 1000, (), 1000)) == pytest.approx(0.5 + WEIGHTS_S + 1000 * 64 / 1e4)


def test_shared_keys_are_read_once() -> None:
    assert roofline().step_s(StepWork(10, 1000, (), 100)) == pytest.approx(0.5 + WEIGHTS_S + 100 * 64 / 1e4)
    assert roofline().step_s(StepWork(10, 1000, (), 9000)) == pytest.approx(0.5 + WEIGHTS_S + 1000 * 64 / 1e4)


def test_prompts_are_bound_by_products() -> None:
    chunk = StepWork(0, 0, ((1000, 1000),), 0)
    pairs = 1000 * 1001 / 2
    expected = 0.5 + (2 * LAYERS * 1000 + 2 * 800) / 1e6 + 4 * 2 * 4 * 4 * pairs / 1e6
    assert roofline().step_s(chunk) == pytest.approx(expected)
    half = replace(IDEAL, flops=0.5, attention_flops=0.5)
    assert roofline(efficiency=half).step_s(chunk) == pytest.approx(0.5 + 2 * (expected - 0.5))


def test_several_chips_share_the_work_and_exchange_sums() -> None:
    work = StepWork(4, 400, (), 400)
    alone = roofline().step_s(work) - 0.5
    moved = 2 * 2 * 8 * 2 * 2 * 3 / 4 * 4  # all-reduces, numbers, bytes, of which each link carries 2 (n - 1) / n; rows
    assert roofline(num_chips=4).step_s(work) == pytest.approx(0.5 + 4 * 0.25 + alone / 4 + moved / 1e3)


@pytest.mark.parametrize(
    ("name", "weights_gb", "hbm_gb_per_s"),
    [("llama8b_h200", 15.0, 4800), ("llama8b_v6e", 15.0, 1640), ("llama70b_tp8_h200", 139.0, 8 * 4800)],
)
def test_shipped_models_are_near_the_floor(name: str, weights_gb: float, hbm_gb_per_s: float) -> None:
    """One sequence cannot decode faster than the weights are read, and should not be shown much slower."""
    floor = weights_gb / hbm_gb_per_s
    assert floor < find_cost(name).step_s(StepWork(1, 500, (), 500)) < 2 * floor + 0.002
