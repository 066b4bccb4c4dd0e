"""The files that pictures are made from: whose turn it is, how large pictures become, what is wrong with a file.

Imports no torch: command lines look at every file before a model is loaded.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

from library.data.headers import BadImage, open_image, read_header
from library.generate.options import check_size
from library.options import OptionError, require

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
SIZE_STEP = 32  # pixels: sizes of pictures that are made from pictures are rounded down to multiples of this
LARGEST_STRETCH = 1.05  # between the proportions of a mask and of its picture


def files_of(path: str | None, flag: str) -> tuple[str, ...]:
    """The file, or the pictures of a folder in the order of their names; raises OptionError where there are none."""
    if path is None:
        return ()
    where = Path(path)
    require(where.exists(), flag, f"{path} does not exist", "check the path")
    if not where.is_dir():
        return (path,)
    found = sorted(str(file) for file in where.iterdir() if file.suffix.lower() in SUFFIXES)
    require(bool(found), flag, f"{path} holds no picture", f"{', '.join(SUFFIXES)} are looked for")
    return tuple(found)


@functools.cache
def size_of(path: str, flag: str) -> tuple[int, int]:
    """Width and height of an upright picture; OptionError names a file that is not whole, and its `flag`."""
    try:
        size = read_header(path).size_wh
        with open_image(path) as image:
            image.load()
    except BadImage as error:
        raise OptionError(flag, f"{path} {error}", "replace it") from None
    except Exception as error:  # Pillow's plug-ins raise OSError, SyntaxError, ValueError, struct.error ...
        raise OptionError(flag, f"{path} can't be read ({error})", "replace it") from None
    return size


@dataclass(frozen=True)
class Sources:
    """Pictures to start from and masks, each taken in turn."""

    images: tuple[str, ...] = ()
    masks: tuple[str, ...] = ()
    given_size: tuple[int, int] | None = None  # of --W and --H, where both are given

    @classmethod
    def of(cls, image_path: str | None, mask_path: str | None, given_size: tuple[int, int] | None) -> Sources:
        images, masks = files_of(image_path, "--image_path"), files_of(mask_path, "--mask_path")
        way_out = "add --image_path, the picture that the mask belongs to"
        require(bool(images) or not masks, "--mask_path", "there is no picture to draw anew", way_out)
        return cls(images, masks, given_size)

    def image(self, number: int) -> str:
        """The file for picture `number`; an empty text where pictures start from noise."""
        return self.images[number % len(self.images)] if self.images else ""

    def mask(self, number: int) -> str:
        """The mask for picture `number`, if any; OptionError where its proportions are not those of its picture."""
        if not self.masks:
            return ""
        mask, image = self.masks[number % len(self.masks)], self.image(number)
        own, source = size_of(mask, "--mask_path"), size_of(image, "--image_path")
        if not any(_alike(own, size) for size in (source, self.given_size) if size is not None):
            problem = f"{mask} has {own[0]}x{own[1]} pixels, and its picture {image} has {source[0]}x{source[1]}"
            raise OptionError("--mask_path", problem, "make the mask as large as the picture")
        return mask

    def size(self, number: int) -> tuple[int, int]:
        """Width and height of what is made from file `number`: as asked for, in multiples of 32."""
        width, height = (side // SIZE_STEP * SIZE_STEP for side in self.asked_size(number))
        for side in (width, height):
            check_size(f"--image_path {self.image(number)}", side)
        return width, height

    def asked_size(self, number: int) -> tuple[int, int]:
        """That of --W and --H, or of file `number` itself."""
        return self.given_size or size_of(self.image(number), "--image_path")


def _alike(one: tuple[int, int], other: tuple[int, int]) -> bool:
    stretch = one[0] * other[1] / (one[1] * other[0])
    return 1 / LARGEST_STRETCH < stretch < LARGEST_STRETCH
