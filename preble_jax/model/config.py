"""The shape of a Llama-family decoder, read from a Hugging Face `config.json` (GGUF: `weights/gguf.py`).

Everything the project does not implement is refused here, by name, so that no checkpoint is ever served wrongly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from preble_jax.errors import CheckpointError

_SUPPORTED_TYPES = ("llama", "mistral")
_MISSING = object()


@dataclass(frozen=True, kw_only=True)
class Llama3RopeScaling:
    """Llama 3.1's scaling: long wavelengths are slowed down `factor` times, short ones kept, those between blended.

    Source: Hugging Face transformers, `modeling_rope_utils._compute_llama3_parameters`.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int

    def __post_init__(self) -> None:
        if not self.low_freq_factor < self.high_freq_factor:
            raise CheckpointError(
                f"config.json: expected rope scaling with low_freq_factor < high_freq_factor, got "
                f"{self.low_freq_factor} and {self.high_freq_factor}"
            )


@dataclass(frozen=True, kw_only=True)
class LinearRopeScaling:
    """All positions are divided by `factor`."""

    factor: float


RopeScaling = Llama3RopeScaling | LinearRopeScaling


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes and constants of one model.

    max_position:      tokens the model was made for (prompt and output together).
    rope_freq_factors: divisors of the head_dim / 2 rotary frequencies, as GGUF files carry them; None: all ones.
    tie_embeddings:    the output matrix is the embedding, transposed.
    eos_token_ids:     any of them ends a request.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    rope_freq_factors: tuple[float, ...] | None = None
    tie_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise CheckpointError(f"model config: expected {name} to be an integer >= 1, got {value!r}")
        if self.num_heads % self.num_kv_heads:
            raise CheckpointError(
                f"model config: expected num_heads to be a multiple of num_kv_heads, "
                f"got {self.num_heads} and {self.num_kv_heads}"
            )
        for token in (*self.eos_token_ids, *(() if self.bos_token_id is None else (self.bos_token_id,))):
            if not 0 <= token < self.vocab_size:
                raise CheckpointError(f"model config: expected token ids below {self.vocab_size}, got {token}")
        if self.head_dim % 2:
            raise CheckpointError(f"model config: expected an even head_dim (rotary pairs), got {self.head_dim}")
        if self.rope_freq_factors is not None and len(self.rope_freq_factors) != self.head_dim // 2:
            raise CheckpointError(
                f"model config: expected {self.head_dim // 2} rotary frequency factors (head_dim / 2), "
                f"got {len(self.rope_freq_factors)}"
            )

    @property
    def num_query_groups(self) -> int:
        """G: query heads that share one key/value head."""
        return self.num_heads // self.num_kv_heads

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], generation_config: Mapping[str, Any] | None = None) -> ModelConfig:
        """From a parsed `config.json`, and `generation_config.json` for more end-of-sequence ids.

        Raises CheckpointError for a missing or ill-typed key and for an architecture that is not supported.
        """
        _refuse_unsupported(config)
        num_heads = _integer(config, "num_attention_heads")
        hidden_size = _integer(config, "hidden_size")
        head_dim = config.get("head_dim")
        if head_dim is None and num_heads > 0:  # num_heads == 0 is refused by __post_init__
            head_dim = hidden_size // num_heads
        factors = config.get("rope_freq_factors")
        return cls(
            vocab_size=_integer(config, "vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=_integer(config, "intermediate_size"),
            num_layers=_integer(config, "num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=_integer(config, "num_key_value_heads", num_heads),
            head_dim=head_dim or 0,
            max_position=_integer(config, "max_position_embeddings"),
            rms_norm_eps=_number(config, "rms_norm_eps", 1e-6),
            rope_theta=_rope_theta(config),
            rope_scaling=_rope_scaling(config),
            rope_freq_factors=None if factors is None else _positive_numbers("rope_freq_factors", factors),
            tie_embeddings=bool(config.get("tie_word_embeddings", False)),
            bos_token_id=next(iter(_token_ids(config, "bos_token_id")), None),
            eos_token_ids=tuple(
                dict.fromkeys(_token_ids(generation_config or {}, "eos_token_id") + _token_ids(config, "eos_token_id"))
            ),
        )

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` that `from_hf` reads back to an equal config.

        `rope_freq_factors` is this project's own key: Hugging Face has no place for them.
        """
        config: dict[str, Any] = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": self.max_position,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": _rope_scaling_to_hf(self.rope_scaling),
            "tie_word_embeddings": self.tie_embeddings,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": list(self.eos_token_ids),
        }
        if self.rope_freq_factors is not None:
            config["rope_freq_factors"] = list(self.rope_freq_factors)
        return config


_POSITIVE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "max_position",
)


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    model_type = config.get("model_type")
    if model_type not in _SUPPORTED_TYPES:
        raise CheckpointError(
            f"config.json: expected model_type to be one of {', '.join(_SUPPORTED_TYPES)}, got {model_type!r}; "
            "only Llama-family decoders can be served"
        )
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise CheckpointError(f"config.json: expected hidden_act 'silu' (SwiGLU), got {activation!r}")
    for key in ("attention_bias", "mlp_bias", "sliding_window", "quantization_config"):
        if config.get(key):
            raise CheckpointError(f"config.json: {key} is not supported, got {config[key]!r}; expected it absent")
    if config.get("partial_rotary_factor", 1.0) != 1.0:
        got = config["partial_rotary_factor"]
        raise CheckpointError(f"config.json: expected rotary embedding of whole heads, got partial_rotary_factor {got}")


def _integer(config: Mapping[str, Any], key: str, default: object = _MISSING) -> int:
    value = config.get(key)
    if value is None:
        value = default
    if value is _MISSING:
        raise CheckpointError(f"config.json: expected the key {key!r}, which is missing; is the file complete?")
    if isinstance(value, bool) or not isinstance(value, int):
        raise CheckpointError(f"config.json: expected {key} to be an integer, got {value!r}")
    return value


def _number(config: Mapping[str, Any], key: str, default: object = _MISSING) -> float:
    value = config.get(key, default)
    if value is _MISSING:
        raise CheckpointError(f"config.json: expected the key {key!r}, which is missing; is the file complete?")
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise CheckpointError(f"config.json: expected {key} to be a number > 0, got {value!r}")
    return float(value)


def _positive_numbers(key: str, value: object) -> tuple[float, ...]:
    if not isinstance(value, list | tuple):
        raise CheckpointError(f"config.json: expected {key} to be a list of numbers > 0, got {value!r}")
    return tuple(_number({key: item}, key) for item in value)


def _token_ids(config: Mapping[str, Any], key: str) -> tuple[int, ...]:
    """Token ids are written as one number, a list, or null."""
    value = config.get(key)
    if value is None:
        return ()
    ids = value if isinstance(value, list | tuple) else [value]
    if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in ids):
        raise CheckpointError(f"config.json: expected {key} to be a token id or a list of them, got {value!r}")
    return tuple(ids)


def _rope_section(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """`rope_scaling`, or `rope_parameters` as newer files have it (there it also holds rope_theta)."""
    for key in ("rope_parameters", "rope_scaling"):
        section = config.get(key)
        if section is not None and not isinstance(section, Mapping):
            raise CheckpointError(f"config.json: expected {key} to be an object or null, got {section!r}")
        if section:
            return section
    return {}


def _rope_theta(config: Mapping[str, Any]) -> float:
    section = _rope_section(config)
    return _number(section if "rope_theta" in section else config, "rope_theta", 10_000.0)


def _rope_scaling(config: Mapping[str, Any]) -> RopeScaling | None:
    section = _rope_section(config)
    kind = section.get("rope_type", section.get("type", "default"))
    if kind == "default":
        return None
    if kind == "linear":
        return LinearRopeScaling(factor=_number(section, "factor"))
    if kind == "llama3":
        return Llama3RopeScaling(
            factor=_number(section, "factor"),
            low_freq_factor=_number(section, "low_freq_factor"),
            high_freq_factor=_number(section, "high_freq_factor"),
            original_max_position=_integer(section, "original_max_position_embeddings"),
        )
    raise CheckpointError(f"config.json: expected RoPE scaling of type default, linear or llama3, got {kind!r}")


def _rope_scaling_to_hf(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    if isinstance(scaling, LinearRopeScaling):
        return {"rope_type": "linear", "factor": scaling.factor}
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_position,
    }
