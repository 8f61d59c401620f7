"""Config files, dotted overrides and keywords: what is accepted, and how each mistake is named."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preble_jax.config import Config
from preble_jax.config_files import from_keywords, load_config, parse_overrides
from preble_jax.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = sorted(path for path in (ROOT / "configs").glob("*.py") if path.stem != "__init__")


def write(folder: Path, body: str) -> str:
    path = folder / "deployment.py"
    path.write_text("from ml_collections import ConfigDict\n\n\ndef get_config():\n" + body)
    return str(path)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_file_loads(path: Path) -> None:
    assert load_config(str(path)) == load_config(path.stem)


def test_the_default_deployment_is_two_small_groups() -> None:
    config = load_config()
    assert config == load_config("local")
    assert config.serve.groups == 2
    assert config.engine.max_num_seqs == 16
    assert config.engine.prefill_buckets == (64, 256)
    assert config.kv.memory_gib == 0.5


def test_a_file_names_only_what_differs(tmp_path: Path) -> None:
    file = write(tmp_path, "    return ConfigDict({'kv': {'page_size': 32}})\n")
    expected = dataclasses.replace(Config(), kv=dataclasses.replace(Config().kv, page_size=32))
    assert load_config(file) == expected


def test_weights_may_be_a_mapping(tmp_path: Path) -> None:
    file = write(tmp_path, "    return ConfigDict({'tenants': {'weights': {'gold': 2, 'free': 0.5}}})\n")
    weights = (("free", 0.5), ("gold", 2.0))
    assert tuple(sorted(load_config(file).tenants.weights)) == weights
    assert tuple(sorted(from_keywords(Config(), weights=dict(weights)).tenants.weights)) == weights
    assert tuple(sorted(from_keywords(Config(), tenants={"weights": dict(weights)}).tenants.weights)) == weights


def test_overrides_win_over_the_file(tmp_path: Path) -> None:
    file = write(tmp_path, "    return ConfigDict({'kv': {'page_size': 32, 'num_pages': 7}})\n")
    config = load_config(file, {"kv.page_size": "64"})
    assert (config.kv.page_size, config.kv.num_pages) == (64, 7)


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("kv.page_size", "32", 32),
        ("kv.memory_gib", "1", 1.0),
        ("kv.memory_gib", "auto", "auto"),
        ("kv.memory_fraction", "0.25", 0.25),
        ("kv.prefix_cache", "false", False),
        ("kv.prefix_cache", "True", True),
        ("model.name", "/models/llama", "/models/llama"),
        ("model.dtype", "float32", "float32"),
        ("sched.placement", "round_robin", "round_robin"),
        ("engine.prefill_buckets", "32,64", (32, 64)),
        ("engine.prefill_buckets", "(32, 64)", (32, 64)),
        ("engine.prefill_buckets", "[32]", (32,)),
        ("engine.decode_buckets", "", ()),
        ("tenants.weights", "gold:2, free:0.5", (("gold", 2.0), ("free", 0.5))),
        ("tenants.weights", "{'gold': 2}", (("gold", 2.0),)),
        ("tenants.weights", "region:eu:3", (("region:eu", 3.0),)),
        ("tenants.weights", "", ()),
    ],
)
def test_text_is_read_as_the_settings_type(key: str, text: str, value: object) -> None:
    section, name = key.split(".")
    got = getattr(getattr(load_config(None, {key: text}), section), name)
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("kv.page_size", "a lot", "an integer"),
        ("kv.page_size", 1.5, "an integer"),
        ("kv.page_size", True, "an integer"),
        ("kv.memory_gib", "nan", "a finite number or auto"),
        ("kv.memory_gib", 10**400, "a finite number or auto"),
        ("kv.prefix_cache", "perhaps", "true or false"),
        ("kv.prefix_cache", 1, "true or false"),
        ("model.name", 3, "a string"),
        ("model.dtype", "float16", "one of bfloat16, float32"),
        ("engine.prefill_buckets", "64,large", "a list of integers"),
        ("engine.prefill_buckets", "(64,", "a list of integers"),
        ("engine.prefill_buckets", 64, "a list of integers"),
        ("tenants.weights", "gold", "names with numbers (name:number,name:number)"),
        ("tenants.weights", "gold:much", "names with numbers (name:number,name:number)"),
        ("tenants.weights", ":2", "names with numbers (name:number,name:number)"),
        ("tenants.weights", "(1, 2)", "names with numbers (name:number,name:number)"),
        ("tenants.weights", "{'gold'", "names with numbers (name:number,name:number)"),
    ],
)
def test_an_ill_typed_value_says_what_was_expected_and_what_came(key: str, value: object, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, {key: value})
    assert str(caught.value) == f"{key}: expected {expected}, got {value!r}"


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [
        ("kv.page_sise", "kv.page_size"),
        ("page_size", "kv.page_size"),
        ("kv.page-size", "kv.page_size"),
        ("engine.page_size", "kv.page_size"),
        ("sched.policy", "queue.policy"),
        ("mesh.tensors", "mesh.tensor"),
        ("model.type", "model.dtype"),
    ],
)
def test_an_unknown_key_names_the_nearest(wrong: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{wrong}: no such setting; the nearest is {nearest}$"):
        load_config(None, {wrong: "1"})


def test_a_typo_in_a_file_names_the_file(tmp_path: Path) -> None:
    file = write(tmp_path, "    return ConfigDict({'kv': {'page_sice': 32}})\n")
    with pytest.raises(ConfigError, match=r"kv\.page_sice: .* kv\.page_size \(in .*deployment\.py\)"):
        load_config(file)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("    return 3\n", "must return an ml_collections ConfigDict, got int"),
        ("    return ConfigDict({'kv': 3})\n", "kv: expected a section of settings, got 3"),
        ("    return ConfigDict({'kv': {'page_size': 0}})\n", "kv.page_size: expected >= 1"),
        ("    raise KeyError('disk')\n", "running it raised KeyError: 'disk'"),
        ("    return (\n", "running it raised SyntaxError"),
        ("    pass\n\n\nget_config = None\n", "expected a get_config"),
    ],
)
def test_a_broken_file_is_a_config_error(tmp_path: Path, body: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, body))
    assert message in str(caught.value)


@pytest.mark.parametrize("name", ["lokal", "configs/missing.py"])
def test_a_missing_config_lists_the_shipped_ones(name: str) -> None:
    with pytest.raises(ConfigError, match=r"local, offline, single_group"):
        load_config(name)


def test_parse_overrides_takes_only_its_own() -> None:
    argv = ["serve", "--config.kv.page_size=32", "--json", "f", "--config.model.name=a=b", "--config.kv.page_size=64"]
    assert parse_overrides(argv) == ({"kv.page_size": "64", "model.name": "a=b"}, ["serve", "--json", "f"])
    assert parse_overrides(["--", "--config.kv.page_size=32"]) == ({}, ["--", "--config.kv.page_size=32"])


@pytest.mark.parametrize("argument", ["--config.kv.page_size", "--config.=3"])
def test_an_override_without_key_or_value_is_refused(argument: str) -> None:
    with pytest.raises(ConfigError, match=r"expected --config\.section\.key=value"):
        parse_overrides([argument])


def test_keywords_find_their_sections() -> None:
    base = load_config()
    config = from_keywords(base, page_size=32, tensor=2, dtype="float32", queue={"policy": "fcfs"})
    assert (config.kv.page_size, config.mesh.tensor, config.model.dtype, config.queue.policy) == (
        32,
        2,
        "float32",
        "fcfs",
    )
    assert config.engine == base.engine
    assert from_keywords(base) == base


def test_an_unknown_keyword_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"^pagesize: no such setting; the nearest is page_size$"):
        from_keywords(Config(), pagesize=32)
    with pytest.raises(ConfigError, match=r"^queue\.polici: no such setting; the nearest is queue\.policy$"):
        from_keywords(Config(), queue={"polici": "fcfs"})


def test_every_setting_can_be_a_keyword() -> None:
    """A leaf name in two sections would make LLM(...)'s keywords ambiguous."""
    names = [name for section in typing.get_type_hints(Config).values() for name in typing.get_type_hints(section)]
    assert sorted(names) == sorted(set(names))


@given(st.data())
def test_what_is_printed_can_be_read_back(data: st.DataObject) -> None:
    """Any value of a setting, as str() writes it, overrides to itself."""
    config = from_keywords(
        Config(),
        page_size=data.draw(st.integers(1, 4096)),
        memory_gib=data.draw(st.floats(0, 1e6)),
        prefix_cache=data.draw(st.booleans()),
        prefill_buckets=data.draw(st.lists(st.integers(1, 8192), max_size=4)),
        weights=data.draw(st.dictionaries(st.text(min_size=1), st.floats(0.01, 100), max_size=3)),
    )
    overrides = {
        f"{section.name}.{leaf.name}": str(getattr(getattr(config, section.name), leaf.name))
        for section in dataclasses.fields(config)
        for leaf in dataclasses.fields(getattr(config, section.name))
    }
    assert load_config(None, overrides) == config
