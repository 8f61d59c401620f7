"""A conversation on the terminal, streaming."""

from __future__ import annotations

import sys

from preble_jax.errors import PrebleError
from preble_jax.sampling_params import SamplingParams
from serve.client import Client


def run_chat(client: Client, sampling: SamplingParams, system: str = "") -> None:
    """Reads lines until end of input (Ctrl-D). Ctrl-C stops an answer, and ends the conversation between answers."""
    interactive = sys.stdin.isatty()
    if interactive:
        print("Type a message; Ctrl-C stops an answer, Ctrl-D ends.")
    messages = [{"role": "system", "content": system}] if system else []
    while True:
        try:
            line = input("> " if interactive else "")
        except EOFError:
            return
        if not line.strip():
            continue
        messages.append({"role": "user", "content": line})
        try:
            messages.append({"role": "assistant", "content": _answer(client, messages, sampling)})
        except PrebleError as error:
            if not interactive:
                raise
            messages.pop()
            print(f"error: {error}", file=sys.stderr)


def _answer(client: Client, messages: list[dict[str, str]], sampling: SamplingParams) -> str:
    """Prints the answer as it comes; returns what was printed, all of it or up to Ctrl-C."""
    said: list[str] = []
    try:
        for chunk in client.stream(messages, sampling):
            print(chunk.text, end="", flush=True)
            said.append(chunk.text)
    except KeyboardInterrupt:
        print(" [stopped]", end="")
    print()
    return "".join(said)
