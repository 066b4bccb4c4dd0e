"""Options of masks: pictures that say where something happens."""

from __future__ import annotations

from dataclasses import dataclass

from library.options import opt


@dataclass(frozen=True)
class MaskOptions:
    """Masks."""

    mask_path: str | None = opt(
        help="picture, or folder of pictures; with networks it says where each part of the prompt and its network work"
    )
