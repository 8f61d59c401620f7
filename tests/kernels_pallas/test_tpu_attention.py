"""The TPU kernel in the interpreter (races looked for, unset memory NaN, no read out of bounds) against the oracle."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import Geometry
from kernels_pallas.tpu import attention, blocks, check, make_schedule
from kernels_pallas.tpu.blocks import BlockSizes
from kernels_pallas.tpu.tiles import Tile
from oracles.paged_cases import check_attend, make_case

BF16, F32, INT8, FP8 = jnp.bfloat16, jnp.float32, jnp.int8, jnp.float8_e4m3fn


@pytest.fixture
def no_races(capfd):
    """The interpreter prints the races that it finds. After an error its state has to be cleared."""
    pltpu.reset_tpu_interpret_mode_state()
    yield
    pltpu.reset_tpu_interpret_mode_state()
    printed = capfd.readouterr().out
    assert "RACE DETECTED" not in printed, printed[:2000]


def run(seed=0, *, causal=True, sliding_window=None, soft_cap=None, page_size=16, head_dim=128, **case):
    case = {"kv_heads": 2, "group": 2, "num_decode": 0} | case
    made = make_case(seed, backend="tpu-interpret", page_size=page_size, head_dim=head_dim, **case)
    return check_attend(made, causal=causal, sliding_window=sliding_window, soft_cap=soft_cap)


@pytest.mark.usefixtures("no_races")
@pytest.mark.parametrize(
    ("head_dim", "q_dtype", "page_dtype", "page_size"),
    [
        (64, F32, INT8, 16),
        (64, F32, BF16, 16),
        (128, BF16, BF16, 16),
        (128, BF16, FP8, 64),
        (256, BF16, INT8, 16),
    ],
)
def test_decode(head_dim, q_dtype, page_dtype, page_size):
    lens = [1, 0, page_size - 1, page_size, page_size + 1, 3 * page_size + 2]
    run(
        q_lens=[1] * 6,
        kv_lens=lens,
        num_decode=6,
        head_dim=head_dim,
        q_dtype=q_dtype,
        page_dtype=page_dtype,
        page_size=page_size,
    )


@pytest.mark.usefixtures("no_races")
@pytest.mark.parametrize(
    ("head_dim", "q_dtype", "page_dtype", "page_size", "group"),
    [
        (64, BF16, BF16, 16, 3),
        (64, F32, FP8, 16, 1),
        (64, F32, BF16, 16, 1),
        (128, F32, F32, 16, 4),
        (128, BF16, INT8, 32, 4),
        (256, F32, F32, 16, 2),
    ],
)
def test_prompt_chunks(head_dim, q_dtype, page_dtype, page_size, group):
    """Several tiles a sequence, several blocks of keys a tile; chunks that start and end anywhere."""
    run(
        q_lens=[1, page_size + 1, 0, 19],
        kv_lens=[page_size - 1, page_size + 1, 0, 3 * page_size],
        head_dim=head_dim,
        q_dtype=q_dtype,
        page_dtype=page_dtype,
        page_size=page_size,
        group=group,
    )


@pytest.mark.usefixtures("no_races")
def test_decode_and_prompt_chunks_in_one_step_with_padding():
    run(q_lens=[1, 1, 1, 20, 3], kv_lens=[33, 0, 60, 20, 35], num_decode=3, token_padding=5, seq_padding=2)


@pytest.mark.usefixtures("no_races")
def test_a_padding_only_tail_needs_no_kernel():
    out, _ = run(q_lens=[1, 1], kv_lens=[3, 18], num_decode=2, token_padding=4)
    assert not out[2:].any()


@pytest.mark.usefixtures("no_races")
def test_a_window_skips_what_lies_before_it_and_may_start_within_a_page():
    run(
        sliding_window=21,
        q_lens=[1, 1, 18],
        kv_lens=[70, 9, 61],
        num_decode=2,
        first_readable=[49, 0, 23],
    )


@pytest.mark.usefixtures("no_races")
def test_a_window_cuts_a_block_that_lies_below_the_diagonal():
    """A full block of keys, all before the tile's first query: the window alone hides some of them, from later ones."""
    run(sliding_window=40, q_lens=[18], kv_lens=[80], kv_heads=1)


@pytest.mark.usefixtures("no_races")
def test_a_window_and_a_cap_together():
    run(sliding_window=5, soft_cap=2.0, q_lens=[1, 20], kv_lens=[37, 40], num_decode=1, head_dim=64)


@pytest.mark.usefixtures("no_races")
def test_starts_leave_out_whole_pages_and_may_leave_nothing():
    run(q_lens=[1, 1, 20, 2], kv_lens=[50, 16, 60, 60], num_decode=2, kv_starts=[16, 16, 32, 48])


@pytest.mark.usefixtures("no_races")
def test_without_causality_every_query_sees_the_whole_range():
    run(causal=False, q_lens=[3, 18, 1, 2], kv_lens=[33, 50, 0, 16], kv_starts=[16, 0, 0, 16], head_dim=64)


@pytest.mark.usefixtures("no_races")
def test_queries_before_the_first_key_see_nothing():
    run(q_lens=[20], kv_lens=[7])


@pytest.mark.usefixtures("no_races")
def test_a_step_without_sequences():
    out, lse = run(q_lens=[1, 1, 0], kv_lens=[0, 0, 0], num_decode=2, token_padding=2)
    assert not out.any() and np.isneginf(lse).all()


def test_a_race_would_be_seen(capfd):
    """The fixture above can fail: a copy read before it has arrived."""

    def kernel(x, out, scratch, done):
        copy = pltpu.make_async_copy(x, scratch, done)
        copy.start()
        out[...] = scratch[...]
        copy.wait()

    pltpu.reset_tpu_interpret_mode_state()
    pl.pallas_call(
        kernel,
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
        out_shape=jax.ShapeDtypeStruct((8, 128), F32),
        scratch_shapes=[pltpu.VMEM((8, 128), F32), pltpu.SemaphoreType.DMA(())],
        interpret=blocks.interpret_params(True),
    )(jnp.ones((8, 128), F32)).block_until_ready()
    pltpu.reset_tpu_interpret_mode_state()
    assert "RACE DETECTED" in capfd.readouterr().out


# --- schedules ---------------------------------------------------------------------------------------------------


def geometry(**changes):
    of = {
        "num_tokens": 64,
        "num_seqs": 4,
        "pages_per_seq": 8,
        "num_q_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 128,
        "page_size": 16,
        "num_decode_slots": 2,
        "page_dtype": BF16,
        "q_dtype": BF16,
    }
    return Geometry(**of | changes)


def test_the_schedule_lists_tiles_that_see_a_key():
    lengths = ([0, 1, 2, 25, 30], [0, 0, 0, 0], [0, 40, 50, 9], [4])
    schedule = make_schedule(*(jnp.asarray(x, jnp.int32) for x in lengths), geometry=geometry())
    decode, prefill = schedule.decode, schedule.prefill
    assert decode.count[0] == 1 and decode.seq[0] == 1 and decode.row[0] == decode.tile.rows
    assert (prefill.tile.tokens, prefill.tile.align, prefill.count[0]) == (16, 8, 3)
    rows = {name: getattr(prefill, name)[:3].tolist() for name in ("seq", "row", "start", "end", "position")}
    # 23 tokens at keys 27 to 49: tiles of 16 and 7. Then 5 tokens, at keys 4 to 8, from the next multiple of 8 on.
    assert rows == {
        "seq": [0, 0, 1],
        "row": [0, 32, 48],
        "start": [0, 0, 0],
        "end": [43, 50, 9],
        "position": [27, 43, 4],
    }
    assert prefill.padded_row[:28].tolist() == [*range(23), *range(24, 29)]
    assert prefill.visible.tolist() == [True] * 28 + [False] * 34


def test_a_schedule_is_made_once_and_serves_layers_with_other_windows():
    lengths = [jnp.asarray(x, jnp.int32) for x in ([0, 1, 2, 25, 30], [0] * 4, [3, 40, 50, 9], [4])]
    schedule = jax.jit(lambda *a: make_schedule(*a, geometry=geometry()))(*lengths)
    leaves = jax.tree.leaves(schedule)
    assert all(leaf.dtype in (jnp.int32, jnp.bool_) for leaf in leaves)
    assert isinstance(schedule.prefill.tile, Tile), "block sizes travel with the schedule, as static data"


# --- limits ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_dim": 96}, r"head_dim on TPUs: expected one of \(64, 128, 256\), got 96"),
        ({"page_size": 48}, r"page_size on TPUs: expected one of \(16, 32, 64, 128\), got 48"),
        ({"num_q_heads": 129, "num_kv_heads": 129}, "expected at most 128 a device, got 129"),
        (
            {"pages_per_seq": 65537},
            r"2 decode sequences x 65537 pages x 4 bytes = 524296 bytes of scalar memory, but it may take 524288",
        ),
        ({"num_tokens": 500_000}, "work list: .* bytes of scalar memory for 500000 tokens"),
    ],
)
def test_limits_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        check(geometry(**changes), sliding_window=None, soft_cap=None)


def test_a_table_of_half_the_scalar_memory_is_let_through():
    check(geometry(pages_per_seq=65536), sliding_window=None, soft_cap=None)


def test_a_window_needs_causality():
    with pytest.raises(ValueError, match="sliding_window: expected at least 1, and causal attention, got 4"):
        check(geometry(causal=False, num_decode_slots=0), sliding_window=4, soft_cap=None)


def test_blocks_that_overflow_vmem_are_refused():
    sizes = BlockSizes(rows=4096, keys=8192, buffers=4, heads=2)
    tile = Tile.of(geometry(num_tokens=8192, pages_per_seq=512), "prefill", sizes)
    with pytest.raises(ValueError, match=r"needs about \d+ MiB of VMEM .* may take 108 MiB on interpret"):
        check(geometry(), sliding_window=None, soft_cap=None, tiles=(tile,))


def test_another_geometrys_causality_is_refused():
    q = jnp.zeros((64, 4, 128), BF16)
    with pytest.raises(ValueError, match="causal: expected the geometry's True, got False"):
        attention.attend(
            q,
            *[jnp.zeros(1)] * 6,
            make_schedule(*[jnp.zeros(n, jnp.int32) for n in (5, 4, 4, 1)], geometry=geometry()),
            geometry=geometry(),
            causal=False,
            sm_scale=1.0,
            sliding_window=None,
            soft_cap=None,
        )
