"""Options of what SDXL is told about sizes beside the text (Podell et al. 2023, 2.2)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

from library.options import OptionError, opt, options_of, require

if TYPE_CHECKING:
    from library.generate.prompt_line import PromptLine

LARGEST = 1_000_000  # pixels: beyond any picture, but a slip of the keyboard


def text_name(name: str) -> str:
    """What an option of sizes is called in the text of pictures: "Original height"."""
    return name.replace("_", " ").capitalize()


@dataclass(frozen=True)
class SizeOptions:
    """What SDXL is told about the size of pictures; what is not given is the size that is drawn, cut from nothing.

    The model learned which pictures were small, and which were cut off: it draws as if this one came from such a file.
    """

    original_height: int | None = opt(help="tell the model this height of the original in pixels (SDXL)")
    original_width: int | None = opt(help="tell the model this width of the original in pixels (SDXL)")
    original_height_negative: int | None = opt(
        help="original height told with the negative prompt; --original_height without this option"
    )
    original_width_negative: int | None = opt(
        help="original width told with the negative prompt; --original_width without this option"
    )
    crop_top: int | None = opt(help="tell the model that this many pixels were cut off above; 0 without this option")
    crop_left: int | None = opt(
        help="tell the model that this many pixels were cut off on the left; 0 without this option"
    )

    def __post_init__(self) -> None:
        for name, value in self.given.items():
            least = 0 if name.startswith("crop") else 1
            way_out = f"use {least} to {LARGEST}"
            require(least <= value <= LARGEST, f"--{name}", f"{value} is out of range", way_out)

    @property
    def given(self) -> dict[str, int]:
        """What is told otherwise than by the picture itself, by name."""
        values = {option.name: getattr(self, option.name) for option in options_of(SizeOptions)}
        return {name: value for name, value in values.items() if value is not None}

    def of_line(self, line: PromptLine) -> SizeOptions:
        """The same with what a prompt's line says; OptionError names it for values out of range."""
        own = {option.name: getattr(line, option.name) for option in options_of(SizeOptions)}
        own = {name: value for name, value in own.items() if value is not None}
        try:
            return dataclasses.replace(self, **own)
        except OptionError as error:
            raise OptionError(line.where, str(error)) from None

    def scaled(self, scale: float) -> SizeOptions:
        """As a first stage of this share of the size is told (highres fix)."""
        return dataclasses.replace(self, **{name: int(value * scale + 0.5) for name, value in self.given.items()})

    def original_hw(self, height: int, width: int) -> tuple[int, int]:
        """Told with a prompt, for a picture of this size."""
        return self.original_height or height, self.original_width or width

    def negative_original_hw(self, height: int, width: int) -> tuple[int, int]:
        """Told with the negative prompt."""
        height, width = self.original_hw(height, width)
        return self.original_height_negative or height, self.original_width_negative or width

    @property
    def crop_yx(self) -> tuple[int, int]:
        return self.crop_top or 0, self.crop_left or 0
