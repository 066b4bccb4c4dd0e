"""Which names can be words of textual inversion. Importing this brings no torch."""

from __future__ import annotations

import functools
import json
from pathlib import Path

from library.options import require

VOCABULARY = Path(__file__).resolve().parent / "clip_vocab"


def check_name(flag: str, name: str, path: str) -> None:
    """Raise OptionError for a name that is a word of CLIP's vocabulary already; `flag` and `path` brought it."""
    require(bool(name.strip()), flag, f"{path} has no name that could be a word", "rename the file")
    is_new = name.lower() not in _vocabulary()
    require(is_new, flag, f"{path} would be the word {name!r}, which has a meaning already", "rename the file")


@functools.cache
def _vocabulary() -> frozenset[str]:
    return frozenset(json.loads((VOCABULARY / "vocab.json").read_text(encoding="utf-8")))
