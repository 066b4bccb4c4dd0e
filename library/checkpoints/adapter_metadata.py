"""What PEFT files say of the strength of a LoRA: diffusers keeps the configuration of its adapters in the header.

The entry `lora_adapter_metadata` is JSON: "<part>.r", "<part>.lora_alpha", "<part>.rank_pattern",
"<part>.alpha_pattern", ... with the parts "unet", "text_encoder" and "text_encoder_2" (diffusers from 0.34 on). A file
without it has alpha = rank everywhere. Patterns are regular expressions for the end of a module's path, as PEFT reads
them. No torch.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from library.options import OptionError

METADATA_KEY = "lora_adapter_metadata"
FIRST_FACTOR = re.compile(r"((unet|text_encoder|text_encoder_2)\.(.+))\.(?:lora_A|lora\.down)(?:\.default)?\.weight")
TEXT_LEVEL = "text_model."  # transformers 5 leaves it out; a path's end means the same with and without it


def adapter_alphas(
    shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str], file: Path | str
) -> dict[str, float]:
    """Module path, with its part -> alpha as the trade means it: the change is up @ down times alpha / rank.

    Empty for a file that says nothing of it. Raises OptionError, naming the file, for what can't be understood.
    """
    if METADATA_KEY not in metadata:
        return {}
    try:
        content = json.loads(metadata[METADATA_KEY])
        if not content:
            return {}
        patterns = {part: _Patterns(content, part) for part in ("unet", "text_encoder", "text_encoder_2")}
        found = {}
        for key, shape in shapes.items():
            if (match := FIRST_FACTOR.fullmatch(key)) and match[2] in patterns and len(shape) > 1:
                alpha = patterns[match[2]].alpha(match[3], rank=shape[0])
                if alpha is not None and not math.isfinite(alpha):
                    raise ValueError(f"the alpha of {match[1]} is {alpha}")
                if alpha is not None:
                    found[match[1]] = alpha
    except (ValueError, TypeError, AttributeError, re.error) as error:
        problem = f"{file}: the entry {METADATA_KEY} of its header can't be understood ({error})"
        raise OptionError("", problem, "take another file") from None
    return found


class _Patterns:
    """What the header says of one part of a model."""

    def __init__(self, content: Mapping[str, Any], part: str) -> None:
        own = {key.removeprefix(f"{part}."): value for key, value in content.items() if key.startswith(f"{part}.")}
        self.usual = own.get("lora_alpha")
        self.alphas: Mapping[str, Any] = own.get("alpha_pattern") or {}
        self.patterns = [(re.compile(rf"(.*\.)?({key})$"), alpha) for key, alpha in self.alphas.items()]
        self.is_rank_stabilized = bool(own.get("use_rslora"))  # alpha / sqrt(rank) in place of alpha / rank

    def alpha(self, path: str, *, rank: int) -> float | None:
        """None where nothing is said."""
        value = self.alphas.get(path, self.alphas.get(path.removeprefix(TEXT_LEVEL)))
        if value is None:
            value = next((alpha for pattern, alpha in self.patterns if pattern.match(path)), self.usual)
        if value is None:
            return None
        return float(value) * (math.sqrt(rank) if self.is_rank_stabilized else 1.0)


def adapter_metadata(modules: Mapping[str, tuple[int, float]]) -> str:
    """The header entry for modules by path, with its part: (rank, alpha). Any LoraConfig of PEFT is made of it."""
    content: dict[str, Any] = {}
    for part in ("unet", "text_encoder", "text_encoder_2"):
        # the ends of paths, which fit text encoders of every version of transformers
        own = {
            path.removeprefix(f"{part}.").removeprefix(TEXT_LEVEL): sizes
            for path, sizes in modules.items()
            if path.startswith(f"{part}.")
        }
        if not own:
            continue
        rank = Counter(rank for rank, _ in own.values()).most_common(1)[0][0]
        alpha = Counter(alpha for _, alpha in own.values()).most_common(1)[0][0]
        settings = {
            "peft_type": "LORA",
            "r": rank,
            "lora_alpha": _number(alpha),
            "rank_pattern": {path: own_rank for path, (own_rank, _) in own.items() if own_rank != rank},
            "alpha_pattern": {path: _number(own_alpha) for path, (_, own_alpha) in own.items() if own_alpha != alpha},
            "target_modules": sorted(own),
            "lora_dropout": 0.0,
            "bias": "none",
            "use_dora": False,
            "use_rslora": False,
        }
        content |= {f"{part}.{name}": value for name, value in settings.items()}
    return json.dumps(content, sort_keys=True)


def _number(value: float) -> int | float:
    return int(value) if value == int(value) else value
