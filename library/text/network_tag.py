"""How prompts of web user interfaces ask for a network."""

from __future__ import annotations


def network_tag(name: str, multiplier: float = 1.0) -> str:
    """ "<lora:name:1>"; `name` is that of the file, without its extension."""
    return f"<lora:{name}:{multiplier:g}>"
