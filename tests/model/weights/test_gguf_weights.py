"""GGUF: every quantised type, llama.cpp's row order, and files damaged in every way a download can damage one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants
from hypothesis import given, settings
from hypothesis import strategies as st

from fakes.checkpoints import (
    TINY,
    gguf_metadata,
    gguf_tensors,
    packed,
    random_hf_tensors,
    tokenizer_metadata,
    write_gguf,
)
from preble_jax.errors import CheckpointError
from preble_jax.model.config import LinearRopeScaling
from preble_jax.model.params import param_table
from preble_jax.model.tokenizer import load_tokenizer
from preble_jax.model.weights import open_checkpoint
from preble_jax.model.weights.gguf_file import GGUFFile

QUANTISED = sorted(quants._type_traits, key=lambda kind: kind.name)
METADATA = {**gguf_metadata(TINY), **tokenizer_metadata()}
WIDE = replace(TINY, vocab_size=64, hidden_size=256, intermediate_size=512, head_dim=32, num_layers=1)
"""Rows are multiples of 256, the longest block of a quantised type."""
WIDE_METADATA = {**gguf_metadata(WIDE), **tokenizer_metadata()}


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tensors = gguf_tensors(TINY, random_hf_tensors(TINY))
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", tensors, METADATA)


def test_float32_tensors_come_back_exactly_in_hugging_face_order(tiny_gguf: Path) -> None:
    expected = packed(TINY, random_hf_tensors(TINY))
    checkpoint = open_checkpoint(tiny_gguf)
    for spec in param_table(TINY):
        np.testing.assert_array_equal(checkpoint.read(spec), expected[spec.path], err_msg=spec.path)
    checkpoint.close()


def test_config_from_metadata(tiny_gguf: Path) -> None:
    assert open_checkpoint(tiny_gguf).model_config == TINY


@pytest.mark.parametrize("kind", QUANTISED, ids=lambda kind: kind.name)
def test_every_type_the_package_dequantises_is_read(kind: GGMLQuantizationType, tmp_path: Path) -> None:
    """Blocks of random bytes (small half-precision scales, so that all is finite) in one matrix of the model."""
    name, spec = "blk.0.ffn_down.weight", next(s for s in param_table(WIDE) if s.path == "layers.0.down")
    block, size = GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(kind.value)
    raw = rng.integers(0, 0x3C, (WIDE.hidden_size, WIDE.intermediate_size // block * size), np.uint8)
    tensors = gguf_tensors(WIDE, random_hf_tensors(WIDE)) | {name: raw}
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", tensors, WIDE_METADATA, {name: kind}))
    got = checkpoint.read(spec)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, quants.dequantize(raw, kind).T)
    assert np.isfinite(got).all()
    assert len(np.unique(got)) > 1


@pytest.mark.parametrize(
    ("kind", "tolerance"),
    [("BF16", 0.02), ("Q4_0", 0.5), ("Q4_1", 0.3), ("Q5_0", 0.25), ("Q5_1", 0.15), ("Q8_0", 0.03), ("F16", 0.002)],
)
def test_quantised_weights_are_near_what_was_quantised(kind: str, tolerance: float, tmp_path: Path) -> None:
    """The whole way round, in every matrix: a wrong order of rows or of nibbles would be off by whole units."""
    hf, dtype = random_hf_tensors(WIDE), GGMLQuantizationType[kind]
    tensors = gguf_tensors(WIDE, hf)
    raw = {name: quants.quantize(t, dtype) if t.ndim == 2 else t for name, t in tensors.items()}
    types = {name: dtype for name, t in tensors.items() if t.ndim == 2}
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", raw, WIDE_METADATA, types))
    for spec in param_table(WIDE):
        error = np.abs(checkpoint.read(spec) - packed(WIDE, hf)[spec.path]).max()
        assert error < tolerance, f"{spec.path}: {error}"


def test_rotary_factors_scaling_and_tied_output(tmp_path: Path) -> None:
    tensors = gguf_tensors(TINY, random_hf_tensors(TINY))
    del tensors["output.weight"]
    factors = np.linspace(1, 8, TINY.head_dim // 2, dtype=np.float32)
    tensors["rope_freqs.weight"] = factors
    metadata = METADATA | {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0}
    config = open_checkpoint(write_gguf(tmp_path / "m.gguf", tensors, metadata)).model_config
    assert config.rope_freq_factors == tuple(factors.tolist())
    assert config.rope_scaling == LinearRopeScaling(factor=2.0)
    assert config.tie_embeddings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"llama.block_count": None}, "llama.block_count"),
        ({"llama.block_count": 3_000_000_000}, "layers"),
        ({"llama.block_count": "two"}, "llama.block_count"),
        ({"llama.expert_count": 8}, "mixture-of-experts"),
        ({"split.count": 3}, "llama-gguf-split"),
        ({"llama.rope.scaling.type": "yarn"}, "yarn"),
        ({"llama.rope.dimension_count": 16}, "llama.rope.dimension_count"),
        ({"llama.attention.head_count_kv": [4, 2]}, "llama.attention.head_count_kv"),
        ({"llama.attention.head_count_kv": 3}, "multiple of num_kv_heads"),
    ],
)
def test_models_that_are_not_understood_are_refused(changes: dict, message: str, tmp_path: Path) -> None:
    metadata = {key: value for key, value in (METADATA | changes).items() if value is not None}
    path = write_gguf(tmp_path / "m.gguf", gguf_tensors(TINY, random_hf_tensors(TINY)), metadata)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(path)


def test_per_layer_lists_of_one_number_are_that_number(tmp_path: Path) -> None:
    metadata = METADATA | {"llama.attention.head_count_kv": [4, 4]}
    path = write_gguf(tmp_path / "m.gguf", gguf_tensors(TINY, random_hf_tensors(TINY)), metadata)
    assert open_checkpoint(path).model_config == TINY


def test_other_architectures_biases_and_types_are_refused(tmp_path: Path) -> None:
    tensors = gguf_tensors(TINY, random_hf_tensors(TINY))
    with pytest.raises(CheckpointError, match="'gemma'"):
        open_checkpoint(write_gguf(tmp_path / "a.gguf", tensors, METADATA, architecture="gemma"))
    biased = tensors | {"blk.0.attn_q.bias": np.zeros(64, np.float32)}
    with pytest.raises(CheckpointError, match="without biases"):
        open_checkpoint(write_gguf(tmp_path / "b.gguf", biased, METADATA))
    integers = tensors | {"output_norm.weight": np.ones(48, np.int32)}
    checkpoint = open_checkpoint(write_gguf(tmp_path / "c.gguf", integers, METADATA))
    with pytest.raises(CheckpointError, match="I32"):
        checkpoint.read(next(s for s in param_table(TINY) if s.path == "final_norm"))


def test_missing_tensor_and_wrong_shape_are_named(tmp_path: Path) -> None:
    tensors = gguf_tensors(TINY, random_hf_tensors(TINY))
    del tensors["blk.1.attn_v.weight"]
    tensors["blk.0.ffn_up.weight"] = np.zeros((64, 40), np.float32)
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", tensors, METADATA))
    specs = {spec.path: spec for spec in param_table(TINY)}
    with pytest.raises(CheckpointError, match=r"blk\.1\.attn_v\.weight"):
        checkpoint.read(specs["layers.1.qkv"])
    with pytest.raises(CheckpointError, match=r"expected tensor .* \[64, 48\].* got \[64, 40\]"):
        checkpoint.read(specs["layers.0.gate_up"])


def test_a_file_cut_anywhere_is_refused_when_it_is_opened(tiny_gguf: Path, tmp_path: Path) -> None:
    """All cuts in the first bytes, then a sample over header and data, then all of the last ones."""
    whole = tiny_gguf.read_bytes()
    cuts = [*range(200), *range(200, len(whole), 997), *range(len(whole) - 20, len(whole))]
    path = tmp_path / "cut.gguf"
    for cut in cuts:
        path.write_bytes(whole[:cut])
        with pytest.raises(CheckpointError, match=r"cut\.gguf"):
            open_checkpoint(path)
        if cut < 1000:  # the tokenizer's reader finds out as well
            with pytest.raises(CheckpointError, match=r"cut\.gguf"):
                load_tokenizer(path)
    path.write_bytes(whole)
    open_checkpoint(path).close()


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_damaged_headers_raise_nothing_but_checkpoint_errors(
    data: st.DataObject, tiny_gguf: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Any byte of the header may be anything. Lengths become absurd, types unknown, text not UTF-8; never a hang."""
    raw = bytearray(tiny_gguf.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, 12_000))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged.gguf"
    path.write_bytes(raw)
    try:
        checkpoint = open_checkpoint(path)
        for spec in param_table(checkpoint.model_config)[:3]:
            checkpoint.read(spec)
    except CheckpointError:
        pass


@pytest.mark.parametrize("content", [b"", b"GGU", b"PK\x03\x04" + bytes(100), b"GGUF" + bytes(100)])
def test_what_is_not_gguf_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "other.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"other\.gguf.*(expected|truncated)"):
        open_checkpoint(path)
    with pytest.raises(CheckpointError, match="does not exist"):
        open_checkpoint(tmp_path / "nowhere.gguf")


def test_big_endian_files_are_refused(tiny_gguf: Path, tmp_path: Path) -> None:
    raw = bytearray(tiny_gguf.read_bytes())
    raw[4:8] = (3).to_bytes(4, "big")
    (tmp_path / "big.gguf").write_bytes(raw)
    with pytest.raises(CheckpointError, match="little-endian"):
        open_checkpoint(tmp_path / "big.gguf")


def test_header_agrees_with_the_gguf_packages_reader(default_model: Path) -> None:
    from gguf import GGUFReader

    ours, theirs = GGUFFile(default_model), GGUFReader(default_model)
    assert {key for key in theirs.fields if not key.startswith("GGUF.")} == set(ours.metadata)
    for key, value in ours.metadata.items():
        expected = theirs.fields[key].contents()
        assert (value.tolist() if isinstance(value, np.ndarray) else value) == expected, key
    assert len(theirs.tensors) == len(ours.tensors)
    for tensor in theirs.tensors:
        info = ours.tensors[tensor.name]
        expected_place = (tensor.tensor_type, tensor.data_offset, tensor.n_bytes, tuple(tensor.shape.tolist())[::-1])
        assert (info.type, info.offset, info.num_bytes, info.shape) == expected_place
    np.testing.assert_array_equal(
        ours.read("blk.3.ffn_up.weight"),
        quants.dequantize(
            next(t for t in theirs.tensors if t.name == "blk.3.ffn_up.weight").data, GGMLQuantizationType.Q4_1
        ),
    )
