"""The demonstration's requests: every question of every prefix family, in an order drawn from a seed.

`serve/demo_prompts/families.json` lists the families. In a "chat" family the shared text is the system message and
the question the user's; in a "text" family the prompt is the shared text followed by the question.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable

from serve.client import PromptInput

PROMPTS = files("serve") / "demo_prompts"


@dataclass(frozen=True, kw_only=True)
class DemoRequest:
    """index: place in the order of sending, from 0."""

    index: int
    family: str
    question: str
    prompt: PromptInput


def load_requests(seed: int, folder: Traversable = PROMPTS) -> list[DemoRequest]:
    """Same seed, same order."""
    asked: list[tuple[str, str, PromptInput]] = []
    for family in json.loads((folder / "families.json").read_text(encoding="utf-8")):
        shared = (folder / family["shared_file"]).read_text(encoding="utf-8")
        for question in family["questions"]:
            asked.append((family["name"], question, _prompt(family["kind"], shared, question)))
    random.Random(seed).shuffle(asked)
    return [
        DemoRequest(index=index, family=name, question=question, prompt=prompt)
        for index, (name, question, prompt) in enumerate(asked)
    ]


def _prompt(kind: str, shared: str, question: str) -> PromptInput:
    if kind == "chat":
        return [{"role": "system", "content": shared}, {"role": "user", "content": question}]
    return shared + question
