"""What --network_args says to OFT. Importing this brings no torch, so that a mistake is found at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from library.options import OptionError, did_you_mean
from networks.blocks import argument

WORDS = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}


def check_arguments(**kwargs: Any) -> None:
    """Raise OptionError for unknown names and unusable values of --network_args."""
    OFTSettings.parse(kwargs)


@dataclass(frozen=True)
class OFTSettings:
    """What --network_args says, read."""

    enable_all_linear: bool = False  # all layers of the transformers, not only those of their attentions
    enable_conv: bool = False  # convolutions and the layers beside them, too

    @classmethod
    def parse(cls, arguments: Mapping[str, Any]) -> OFTSettings:
        """From the arguments by name: texts (true, false, 1, 0, yes, no, on, off) or booleans."""
        known = [field.name for field in fields(cls)]
        for key in arguments:
            if key not in known:
                way_out = did_you_mean(key, known) or f"OFT knows {' and '.join(known)}"
                raise OptionError(argument(key), "unknown name", way_out)
        return cls(**{key: _switch(value, key) for key, value in arguments.items() if value is not None})


def _switch(value: Any, key: str) -> bool:
    word = str(value).strip().lower()
    if word not in WORDS:
        raise OptionError(argument(key), f"{str(value).strip()!r} is neither true nor false", "use true or false")
    return WORDS[word]
