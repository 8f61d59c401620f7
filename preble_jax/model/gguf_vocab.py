"""Tokenizers out of GGUF metadata: byte-level BPE ("gpt2") and SentencePiece BPE ("llama").

A GGUF file names its pre-tokenizer only (`tokenizer.ggml.pre`); the splitting rules behind the names are llama.cpp's
(src/llama-vocab.cpp), written here as the Hugging Face tokenizers they were taken from have them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from preble_jax.errors import CheckpointError
from preble_jax.model.tokenizer import Tokenizer
from preble_jax.model.weights.gguf import eos_token_ids
from preble_jax.model.weights.gguf_file import GGUFFile

_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6  # tokenizer.ggml.token_type

_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS_CASELESS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,%d}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2 = (_WORDS,)
_DIGITS = (r"\p{N}", _WORDS)
_LLAMA3 = (_WORDS_CASELESS % 3,)
_QWEN2 = (_WORDS_CASELESS % 1,)
_SPLITS: Mapping[str, tuple[str, ...]] = {
    "gpt-2": _GPT2,
    "mpt": _GPT2,
    "olmo": _GPT2,
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "refact": _DIGITS,
    "command-r": _DIGITS,
    "codeshell": _DIGITS,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
}
_LLAMA3_NAMES = tuple(name for name, splits in _SPLITS.items() if splits is _LLAMA3)


def tokenizer_from_gguf(file: GGUFFile) -> Tokenizer:
    """Raises CheckpointError for a tokenizer that is missing, damaged or of a kind that is not known here."""
    meta = file.metadata
    kind = meta.get("tokenizer.ggml.model")
    try:
        if kind == "gpt2":
            backend = _byte_level(meta)
        elif kind == "llama":
            backend = _sentencepiece(meta)
        else:
            raise CheckpointError(f"expected tokenizer.ggml.model 'gpt2' or 'llama', got {kind!r}")
        _add_special(backend, meta)
        _add_boundaries(backend, meta)
    except CheckpointError as error:
        raise CheckpointError(f"{file.path}: {error}") from error
    except Exception as error:  # a missing key, lists of unequal length, or the library's bare Exception
        raise CheckpointError(
            f"{file.path}: expected a whole tokenizer in the metadata, got {type(error).__name__}: {error}"
        ) from error
    return Tokenizer(
        backend,
        bos_token_id=meta.get("tokenizer.ggml.bos_token_id"),
        eos_token_ids=eos_token_ids(meta),
        chat_template=meta.get("tokenizer.chat_template"),
    )


def _byte_level(meta: Mapping[str, Any]) -> tokenizers.Tokenizer:
    pre = str(meta.get("tokenizer.ggml.pre"))
    if pre not in _SPLITS:
        raise CheckpointError(f"expected tokenizer.ggml.pre to be one of {', '.join(sorted(_SPLITS))}, got {pre!r}")
    vocab = {token: i for i, token in enumerate(meta["tokenizer.ggml.tokens"])}
    merges = [_pair(merge) for merge in meta["tokenizer.ggml.merges"]]
    # Llama 3 takes a word that is a token as it is, even where merging would not arrive at it.
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre in _LLAMA3_NAMES))
    splits = [pre_tokenizers.Split(Regex(regex), behavior="isolated") for regex in _SPLITS[pre]]
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def _pair(merge: str) -> tuple[str, str]:
    left, right = merge.split(" ")
    return left, right


def _sentencepiece(meta: Mapping[str, Any]) -> tokenizers.Tokenizer:
    tokens = meta["tokenizer.ggml.tokens"]
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = _merges_from_scores(tokens, meta["tokenizer.ggml.scores"], meta["tokenizer.ggml.token_type"])
    unknown = tokens[meta.get("tokenizer.ggml.unknown_token_id", 0)]
    backend = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    escape = normalizers.Replace(" ", "▁")
    prefix = meta.get("tokenizer.ggml.add_space_prefix", True)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), escape] if prefix else [escape])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return backend


def _merges_from_scores(
    tokens: list[str], scores: np.ndarray[Any, Any], types: np.ndarray[Any, Any]
) -> list[tuple[str, str]]:
    """SentencePiece merges whichever neighbours make the token of the highest score. As a list of merges, best first:
    every way to halve every token, best token first."""
    text_tokens = {
        token: float(score)
        for token, score, kind in zip(tokens, scores, types, strict=True)
        if kind not in (_UNKNOWN, _CONTROL, _BYTE)
    }
    merges = []
    for token in sorted(text_tokens, key=lambda token: -text_tokens[token]):
        halves = ((token[:i], token[i:]) for i in range(1, len(token)))
        merges += [(left, right) for left, right in halves if left in text_tokens and right in text_tokens]
    return merges


def _add_special(backend: tokenizers.Tokenizer, meta: Mapping[str, Any]) -> None:
    """Marks control and user-defined tokens: they are found in a text before anything is split or merged."""
    kinds = list(zip(meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"], strict=True))
    control = [token for token, kind in kinds if kind in (_UNKNOWN, _CONTROL)]
    user_defined = [token for token, kind in kinds if kind == _USER_DEFINED]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in user_defined])


def _add_boundaries(backend: tokenizers.Tokenizer, meta: Mapping[str, Any]) -> None:
    """Puts beginning and end of sequence around every text, where the model was trained so."""
    # Where the file does not say, llama.cpp does it for SentencePiece and Llama 3.
    unasked = meta["tokenizer.ggml.model"] == "llama" or meta.get("tokenizer.ggml.pre") in _LLAMA3_NAMES
    bos = _boundary(meta, "bos") if meta.get("tokenizer.ggml.add_bos_token", unasked) else None
    eos = _boundary(meta, "eos") if meta.get("tokenizer.ggml.add_eos_token", False) else None
    around = [boundary for boundary in (bos, eos) if boundary is not None]
    if around:
        single = [*([bos[0]] if bos else []), "$A", *([eos[0]] if eos else [])]
        backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=around)


def _boundary(meta: Mapping[str, Any], name: str) -> tuple[str, int] | None:
    """Spelling and id of the "bos" or "eos" token."""
    token_id = meta.get(f"tokenizer.ggml.{name}_token_id")
    return None if token_id is None else (meta["tokenizer.ggml.tokens"][token_id], token_id)
