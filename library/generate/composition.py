"""Prompts of several parts: `a castle AND a sunset :0.7`. Importing this brings no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass

JOINT = " AND "
WEIGHT = re.compile(r"\s*:\s*([-+]?(?:\d+\.?\d*|\.\d+))\s*$")


@dataclass(frozen=True)
class PromptPart:
    """One part of a prompt, and how much it counts in a composition."""

    text: str
    weight: float = 1.0


def split_prompt(prompt: str) -> tuple[str, ...]:
    """The parts of a prompt as they stand, weights included; a prompt without AND is one part."""
    return tuple(prompt.split(JOINT))


def prompt_parts(prompt: str) -> tuple[PromptPart, ...]:
    """The parts of a prompt and the weights at their ends, 1 where there is none; a single part has no weight."""
    texts = split_prompt(prompt)
    return tuple(map(_weighted, texts)) if len(texts) > 1 else (PromptPart(prompt),)


def _weighted(text: str) -> PromptPart:
    match = WEIGHT.search(text)
    return PromptPart(text[: match.start()], float(match[1])) if match else PromptPart(text)
