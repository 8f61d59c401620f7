"""Chat messages to a prompt, by the model's own Jinja template, in a sandbox.

Templates are written for Hugging Face transformers; the environment (functions, filters, whitespace rules) is the one
of its `utils/chat_template_utils.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from preble_jax.errors import CheckpointError, InvalidRequestError
from preble_jax.model.tokenizer import Tokenizer

Message = Mapping[str, Any]

_ROLE = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
_PRIVATE_USE = range(0xE000, 0xF900)  # characters that no text means anything by


def render_chat(
    template: str | None,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    *,
    bos_token: str = "",
    eos_token: str = "",
) -> str:
    """The prompt's text.

    messages: objects with a `role` and a `content`: text, a list of {"type": "text", "text": ...} parts (joined by
        newlines), or None beside tool calls. Other keys (`name`, `tool_calls`, ...) are handed to the template.
    tools: JSON schemas of functions, for templates that know tools.
    Raises InvalidRequestError for messages that are ill-formed or that the template refuses, CheckpointError for a
    template that does not compile.
    """
    if template is None:
        raise InvalidRequestError("messages: this model has no chat template; send a text or token prompt instead")
    values = {
        "messages": _checked(messages),
        "tools": list(tools) if tools else None,
        "add_generation_prompt": add_generation_prompt,
        "bos_token": bos_token,
        "eos_token": eos_token,
    }
    compiled = _compiled(template)
    try:
        return compiled.render(values)
    except _Refused as error:
        raise InvalidRequestError(f"messages: the model's chat template refuses them: {error}") from error
    except jinja2.sandbox.SecurityError as error:
        raise CheckpointError(f"chat template: it tries what the sandbox forbids: {error}") from error
    except Exception as error:  # a template is a program: its messages did not fit, in whatever way
        raise InvalidRequestError(
            f"messages: they do not fit the model's chat template: {type(error).__name__}: {error}"
        ) from error


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
) -> list[int]:
    """The prompt's token ids. Control tokens are the template's only: what spells one in a message (in any of its
    texts, or in a tool) becomes ordinary text. Raises as `render_chat`."""
    checked = _checked(messages)
    guard = _Guard(tokenizer, [*checked, *(tools or ())])
    text = render_chat(
        tokenizer.chat_template,
        [{**guard.broken(message), "role": message["role"]} for message in checked],
        [guard.broken(tool) for tool in tools] if tools else None,
        add_generation_prompt,
        bos_token=tokenizer.token(tokenizer.bos_token_id),
        eos_token=tokenizer.token(tokenizer.eos_token_ids[0] if tokenizer.eos_token_ids else None),
    )
    return guard.encode(text)


class _Guard:
    """Keeps control tokens that users spell apart from the template's.

    Wherever a control token is spelled in a user's text, or begins at its end, its first character is replaced by a
    stand-in: a private-use character that occurs nowhere else. The rendered prompt then spells control tokens only
    where the template wrote one. There it is split; in the texts between, the characters are put back before they are
    encoded. Texts that spell no control token stay as they are, so templates may search, trim and measure them.
    """

    def __init__(self, tokenizer: Tokenizer, values: Sequence[Any]) -> None:
        self._tokenizer = tokenizer
        self._patterns = _special_patterns(tuple(tokenizer.special_tokens))
        firsts = sorted({token[0] for token in tokenizer.special_tokens})
        taken = set(tokenizer.chat_template or "").union(*_strings(values))
        free = [chr(c) for c in _PRIVATE_USE if chr(c) not in taken]
        if len(free) < len(firsts):
            raise InvalidRequestError("messages: expected text, got nearly every private-use character of Unicode")
        self._stand_in = dict(zip(firsts, free, strict=False))
        self._original = str.maketrans({stand_in: first for first, stand_in in self._stand_in.items()})
        self._used = False

    def broken(self, value: Any) -> Any:
        """A copy of a JSON-like value in whose strings (keys too) no control token begins."""
        if isinstance(value, str):
            return self._patterns.begins.sub(self._replace, value)
        if isinstance(value, Mapping):
            return {self.broken(key): self.broken(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.broken(item) for item in value]
        return value

    def encode(self, text: str) -> list[int]:
        """Token ids of the rendered prompt."""
        if not self._used:
            return self._tokenizer.encode(text, add_special=False, parse_special=True)
        token_ids: list[int] = []
        for i, part in enumerate(self._patterns.whole.split(text)):
            if i % 2:  # split by a group: the odd parts are what it matched
                token_ids.append(self._tokenizer.special_tokens[part])
            elif part:
                token_ids += self._tokenizer.encode(part.translate(self._original), add_special=False)
        return token_ids

    def _replace(self, match: re.Match[str]) -> str:
        self._used = True
        return self._stand_in[match[0]]


@dataclass(frozen=True)
class _SpecialPatterns:
    """whole: a control token, as a group. begins: its first character, where the rest follows or the text ends."""

    whole: re.Pattern[str]
    begins: re.Pattern[str]


@lru_cache(maxsize=16)
def _special_patterns(tokens: tuple[str, ...]) -> _SpecialPatterns:
    longest_first = sorted((token for token in tokens if token), key=len, reverse=True)
    nothing = "(?!)"
    whole = "|".join(re.escape(token) for token in longest_first) or nothing
    begins = "|".join(f"{re.escape(token[0])}(?={_begun(token[1:])})" for token in longest_first) or nothing
    return _SpecialPatterns(whole=re.compile(f"({whole})"), begins=re.compile(begins, re.DOTALL))


def _begun(rest: str) -> str:
    """A pattern for `rest`, or for a beginning of it that the text's end cuts off."""
    pattern = ""
    for char in reversed(rest):
        pattern = rf"(?:\Z|{re.escape(char)}{pattern})"
    return pattern


def _checked(messages: object) -> list[dict[str, Any]]:
    """Copies of the messages with their content as text. Raises InvalidRequestError, naming the message."""
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise InvalidRequestError(f"messages: expected a non-empty list of objects, got {messages!r:.80}")
    return [_checked_message(i, message) for i, message in enumerate(messages)]


def _checked_message(i: int, message: object) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise InvalidRequestError(f"messages[{i}]: expected an object with role and content, got {message!r:.80}")
    role = message.get("role")
    if not isinstance(role, str) or not _ROLE.fullmatch(role):
        raise InvalidRequestError(f"messages[{i}].role: expected a word such as 'user', got {role!r:.80}")
    content = message.get("content")
    if content is None and not message.get("tool_calls"):
        raise InvalidRequestError(f"messages[{i}].content: expected text, got none")
    return {**message, "content": _text(i, content)}


def _text(i: int, content: Any) -> str | None:
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        raise InvalidRequestError(
            f"messages[{i}].content: expected text or a list of parts, got {type(content).__name__}"
        )
    texts = []
    for j, part in enumerate(content):
        text = part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None
        if not isinstance(text, str):
            raise InvalidRequestError(
                f'messages[{i}].content[{j}]: expected {{"type": "text", "text": ...}}, got {part!r:.80}'
            )
        texts.append(text)
    return "\n".join(texts)


def _strings(value: Any) -> Iterator[str]:
    """All strings of a JSON-like value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)


class _Refused(Exception):
    """The template called `raise_exception`."""


@lru_cache(maxsize=16)
def _compiled(template: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _GenerationTag]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    try:
        return environment.from_string(template)
    except jinja2.TemplateSyntaxError as error:
        raise CheckpointError(f"chat template: expected valid Jinja, line {error.lineno}: {error.message}") from error


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks what to train on; for a prompt it is what stands in it."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own interface)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> NoReturn:
    raise _Refused(message)


def _strftime_now(fmt: str) -> str:
    return datetime.now().strftime(fmt)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """Unlike Jinja's own filter: no HTML escapes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)
