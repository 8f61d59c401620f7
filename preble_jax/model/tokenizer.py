"""Text to token ids and back, byte by byte. Encoding is the `tokenizers` library's; no JAX here.

Two things are done here rather than there. Decoding joins the tokens' *bytes*, so that nothing is guessed about a token
that holds part of a character (`text.py` streams on top of it). And control tokens such as `<|im_end|>` are looked for
in a text only where the caller asks for it: a user's text must not be able to end the user's turn.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from preble_jax.errors import CheckpointError, InvalidRequestError
from preble_jax.model.config import ModelConfig
from preble_jax.model.weights.safetensors import read_json, write_json


class Tokenizer:
    """A model's tokenizer; safe to use from several threads.

    vocab_size:    ids are 0 .. vocab_size - 1 (the model's output matrix may be padded beyond).
    longest_token_bytes: a text of n bytes is at least n / longest_token_bytes tokens.
    special_ids:   control tokens: they stand for no text.
    eos_token_ids: each of them ends an answer.
    chat_template: the model's Jinja template, or None.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos_token_id: int | None = None,
        eos_token_ids: Sequence[int] = (),
        chat_template: str | None = None,
    ) -> None:
        self._parsing = backend  # finds control tokens in a text; `_plain` takes them for what they spell
        self._pieces = _token_bytes(backend)
        self.vocab_size = len(self._pieces)
        self.longest_token_bytes = max(map(len, self._pieces), default=1)
        self.special_ids = frozenset(i for i, token in backend.get_added_tokens_decoder().items() if token.special)
        self.bos_token_id = bos_token_id
        self.eos_token_ids = tuple(eos_token_ids)
        self.chat_template = chat_template

    def encode(self, text: str, *, add_special: bool = True, parse_special: bool = False) -> list[int]:
        """Token ids of `text`.

        add_special:   put the tokens around it that the model was trained with, such as a beginning of sequence.
        parse_special: the text is the caller's own and control tokens spelled in it are meant. Leave it False for text
                       that comes from somebody else.
        Bytes the vocabulary has no token for (SmolLM: six control characters, planes without text) are dropped, as
        the reference tokenizers do. Raises InvalidRequestError for what is not a string of characters.
        """
        backend = self._parsing if parse_special else self._plain
        try:
            return backend.encode(text, add_special_tokens=add_special).ids
        except (TypeError, UnicodeEncodeError) as error:  # not a str; half a surrogate pair
            raise InvalidRequestError(f"text: expected a string of Unicode characters, got {text!r:.80}") from error

    def token_bytes(self, token_id: int) -> bytes:
        """What a token stands for; b"" beyond the vocabulary, where a padded output matrix can still reach.

        Raises InvalidRequestError for a negative id.
        """
        if token_id < 0:
            raise InvalidRequestError(f"token id: expected 0 to {self.vocab_size - 1}, got {token_id}")
        return self._pieces[token_id] if token_id < self.vocab_size else b""

    def decode(self, token_ids: Iterable[int], *, skip_special: bool = True) -> str:
        """The tokens' text; bytes that are no UTF-8 become U+FFFD. skip_special: leave control tokens out."""
        skipped = self.special_ids if skip_special else frozenset()
        return b"".join(self.token_bytes(i) for i in token_ids if i not in skipped).decode("utf-8", "replace")

    def token(self, token_id: int | None) -> str:
        """How a control token is spelled, "" for None (for chat templates)."""
        return "" if token_id is None else self.token_bytes(token_id).decode("utf-8", "replace")

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        """Spelling -> id of every control token."""
        return {self.token(i): i for i in sorted(self.special_ids)}

    def save(self, folder: str | Path) -> None:
        """Writes a Hugging Face tokenizer into `folder`, which `load_tokenizer` reads back."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._parsing.save(str(folder / "tokenizer.json"))
        config: dict[str, Any] = {"chat_template": self.chat_template}
        if self.bos_token_id is not None:
            config["bos_token"] = self.token(self.bos_token_id)
        if self.eos_token_ids:
            config["eos_token"] = self.token(self.eos_token_ids[0])
        write_json(folder / "tokenizer_config.json", config)
        write_json(folder / "generation_config.json", {"eos_token_id": list(self.eos_token_ids)})

    @cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        plain = tokenizers.Tokenizer.from_str(self._parsing.to_str())
        plain.encode_special_tokens = True  # the library's name for: control tokens in a text are text
        return plain


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a `.gguf` file, or of a folder with tokenizer.json. Raises CheckpointError."""
    path = Path(path)
    if path.is_file():
        from preble_jax.model.gguf_vocab import tokenizer_from_gguf
        from preble_jax.model.weights.gguf_file import GGUFFile

        file = GGUFFile(path)
        try:
            return tokenizer_from_gguf(file)
        finally:
            file.close()
    if not (path / "tokenizer.json").is_file():
        raise CheckpointError(f"{path}: expected a .gguf file or a folder with tokenizer.json, got neither")
    return _from_folder(path)


def _from_folder(folder: Path) -> Tokenizer:
    try:
        backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"{folder / 'tokenizer.json'}: expected a tokenizer: {error}; fetch it again") from error
    backend.no_padding()
    backend.no_truncation()
    config = _read_optional(folder / "tokenizer_config.json")
    eos_ids = _eos_ids(folder)
    eos = _content(config.get("eos_token"))
    eos_id = None if eos is None else backend.token_to_id(eos)
    if not eos_ids and eos_id is not None:
        eos_ids = (eos_id,)
    bos = _content(config.get("bos_token"))
    return Tokenizer(
        backend,
        bos_token_id=None if bos is None else backend.token_to_id(bos),
        eos_token_ids=eos_ids,
        chat_template=_chat_template(folder, config),
    )


def _eos_ids(folder: Path) -> tuple[int, ...]:
    """End ids as `ModelConfig` has them: generation_config.json's, then config.json's."""
    generation = _read_optional(folder / "generation_config.json")
    if (folder / "config.json").is_file():
        return ModelConfig.from_hf(read_json(folder / "config.json"), generation).eos_token_ids
    value = generation.get("eos_token_id")
    return tuple(value) if isinstance(value, list) else () if value is None else (int(value),)


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    """`chat_template.jinja`, or the key of tokenizer_config.json: one template, or named ones with a default."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise CheckpointError(f"{folder}: expected chat_template to be text, got {type(template).__name__}")
    return template


def _read_optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _content(token: Any) -> str | None:
    """Special tokens are written as text or as an object with their text under "content"."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def _token_bytes(backend: tokenizers.Tokenizer) -> tuple[bytes, ...]:
    """Each id's bytes. Added tokens spell themselves; the others' spelling depends on the kind of tokenizer."""
    spelled = backend.get_vocab(with_added_tokens=True)
    added = backend.get_added_tokens_decoder()
    piece_bytes = _piece_decoder(backend)
    pieces = [b""] * (max(spelled.values(), default=-1) + 1)
    for spelling, token_id in spelled.items():
        pieces[token_id] = spelling.encode() if token_id in added else piece_bytes(spelling)
    return tuple(pieces)


def _piece_decoder(backend: tokenizers.Tokenizer) -> Any:
    """Byte-level (GPT-2) or SentencePiece, told apart by the decoder the tokenizer declares."""
    decoder = json.loads(backend.to_str())["decoder"] or {}
    kinds = {part["type"] for part in decoder.get("decoders", [decoder]) if "type" in part}
    if "ByteLevel" in kinds:
        return _byte_level_piece
    if kinds & {"ByteFallback", "Metaspace"}:
        return _sentencepiece_piece
    raise CheckpointError(
        f"tokenizer: expected a byte-level or SentencePiece one, got one whose decoder is {sorted(kinds) or 'missing'}"
    )


def _byte_level_piece(spelling: str) -> bytes:
    try:
        return bytes(_BYTE_OF_CHAR[char] for char in spelling)
    except KeyError:  # a piece that is not byte-level after all spells itself
        return spelling.encode()


def _sentencepiece_piece(spelling: str) -> bytes:
    if len(spelling) == 6 and spelling.startswith("<0x") and spelling.endswith(">"):
        return bytes.fromhex(spelling[3:5])
    return spelling.replace("▁", " ").encode()


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes: printable bytes are themselves, the rest follow U+0100 in order.

    Source: openai/gpt-2, encoder.py, `bytes_to_unicode`.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHAR = _byte_alphabet()
