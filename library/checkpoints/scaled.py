"""Checkpoints whose weights are float8 numbers times a scale that stands beside them: no weights by themselves.

Some programs store a weight as `x.weight` in float8 with `x.scale_weight` or `x.weight_scale`, and a marker named
`scaled_fp8`. Whoever takes the numbers without their scales gets a wrong model. No torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from library.options import OptionError

MARKER = "scaled_fp8"
SCALES = (".scale_weight", ".weight_scale")


def scale_key(keys: Iterable[str]) -> str:
    """A key that says that the weights of a file have scales; "" where there is none."""
    return next((key for key in keys if key.rpartition(".")[2] == MARKER or key.endswith(SCALES)), "")


def check_not_scaled(keys: Iterable[str], path: Path | str, where: str) -> None:
    """OptionError naming `where` (a flag) for a file of scaled weights."""
    if key := scale_key(keys):
        problem = f"{path} holds float8 weights with scales of their own ({key}), which are not read here"
        raise OptionError(where, problem, "convert it to fp16 first with the program that made it")
