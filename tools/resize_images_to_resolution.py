"""Make smaller copies of a folder's pictures, in one or several resolutions. See docs/models_and_loras.md."""

from __future__ import annotations

import logging
import math
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if __package__ in (None, ""):  # started as a file: the repository's folder is where library is
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.cli.output_places import output_folder
from library.cli.picture_folders import PictureFolder, encoded, work_through, write_picture
from library.cli.tools import Tool
from library.options import OptionError, opt, require
from library.wording import counted

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

    from library.data.images import Picture

logger = logging.getLogger(__name__)

SOURCE, TARGET = "src_img_folder", "dst_img_folder"
RESOLUTION = re.compile(r"(\d+)x(\d+)")
OPENCV = ("area", "cubic", "lanczos4")  # OpenCV's own; the others are Pillow's, which see all pixels when they shrink
PILLOW = ("lanczos", "bicubic", "bilinear", "linear", "box", "nearest")


@dataclass(frozen=True)
class ResizeOptions:
    """How pictures are made smaller."""

    src_img_folder: str = opt("", help="folder of the pictures; those in folders below it are not looked at")
    dst_img_folder: str = opt("", help="folder to write to; it also gets copies of all other files")
    max_resolution: str = opt(
        "512x512,384x384,256x256,128x128",
        help="resolutions, with commas between: pictures of more pixels are shrunk to that many, in their proportions",
    )
    divisible_by: int = opt(1, help="cut sides, in the middle, to multiples of this many pixels")
    interpolation: str = opt("area", choices=OPENCV + PILLOW, help="how pictures are shrunk")
    save_as_png: bool = opt(False, help="write .png, which keeps transparency, in place of .jpg")
    copy_associated_files: bool = opt(
        False, help="copy files of a picture's name with another extension, such as captions, for each resolution"
    )

    def __post_init__(self) -> None:
        problem = f"{self.divisible_by} is no number of pixels"
        require(self.divisible_by >= 1, "--divisible_by", problem, "use 1 for all sizes, 64 for training without cuts")
        self.limits  # noqa: B018  checks the texts

    @property
    def limits(self) -> dict[str, int]:
        """The most pixels that a picture may have, by the resolution's text."""
        limits = {}
        for text in self.max_resolution.split(","):
            match = RESOLUTION.fullmatch(text.strip())
            if match is None or not (pixels := int(match[1]) * int(match[2])):
                raise OptionError("--max_resolution", f"{text.strip()!r} is no resolution", "write it as 512x512")
            limits[text.strip()] = pixels
        return limits

    @property
    def extension(self) -> str:
        return ".png" if self.save_as_png else ".jpg"


def shrink(options: ResizeOptions) -> None:
    """Raises OptionError for folders that can't be used, and, when all others are done, for pictures that can't."""
    found = PictureFolder.of(options.src_img_folder, SOURCE)
    place = output_folder(options.dst_img_folder, TARGET, Path(options.src_img_folder).expanduser())
    for path in found.others:
        _copy(path, place / path.name)

    def work(path: Path) -> None:
        _shrink(path, place, options)
        for other in found.beside(path) if options.copy_associated_files else ():
            for text in options.limits:
                _copy(other, place / f"{path.stem}+{text}{other.suffix}")

    from library.data.images import usable_cores

    work_through(found.pictures, work, "resizing", SOURCE, threads=usable_cores())
    pictures, others = counted(len(found.pictures), "picture"), counted(len(found.others), "other file")
    logger.info("%s in %s, %s copied", pictures, counted(len(options.limits), "resolution"), others)


def _shrink(path: Path, place: Path, options: ResizeOptions) -> None:
    """One picture in all resolutions, each made from the picture itself."""
    from library.data.headers import BadImage
    from library.data.images import upright_picture

    picture = upright_picture(str(path))
    sizes = {text: size_wh(picture.rgb_HWC.shape[1::-1], limit) for text, limit in options.limits.items()}
    for text, (width, height) in sizes.items():
        if min(width, height) < options.divisible_by:
            raise BadImage(f"at {text} it is {width}x{height}, less than --divisible_by {options.divisible_by}")
    for text, size in sizes.items():
        image = _image(picture, size, options)
        data = encoded(image, options.extension)
        write_picture(place / f"{path.stem}+{text}{options.extension}", data, TARGET)


def size_wh(size: Sequence[int], limit: int) -> tuple[int, int]:
    """Both sides times sqrt(limit / pixels), truncated, where there are more pixels than `limit`.

    In whole numbers: with floating ones 520x520 becomes 511x511 where 512x512 is meant.
    """
    width, height = size
    if width * height <= limit:
        return width, height
    return max(1, math.isqrt(limit * width // height)), max(1, math.isqrt(limit * height // width))


def _image(picture: Picture, size: tuple[int, int], options: ResizeOptions) -> Image:
    """Shrunk and cut; with transparency where the format has it."""
    import numpy as np
    from PIL import Image

    rgb_HWC = _cut(_resized(picture.rgb_HWC, size, options.interpolation), options.divisible_by)
    if picture.alpha_HW is None or not options.save_as_png:
        return Image.fromarray(np.ascontiguousarray(rgb_HWC))
    alpha_HW = _cut(_resized(picture.alpha_HW, size, options.interpolation), options.divisible_by)
    # the picture is on white: c' = a c + (1 - a) 255; resizing is linear in c' and a, so c follows from both
    opacity_HW1 = alpha_HW[..., None] / 255.0
    colour_HWC = (rgb_HWC - 255 * (1 - opacity_HW1)) / np.maximum(opacity_HW1, 1 / 255)
    rgba_HWC = np.concatenate([colour_HWC.round().clip(0, 255), alpha_HW[..., None]], axis=2)
    return Image.fromarray(rgba_HWC.astype(np.uint8))


def _resized(image: np.ndarray, size: tuple[int, int], interpolation: str) -> np.ndarray:
    import cv2

    from library.data.images import resize

    if interpolation in OPENCV and image.shape[1::-1] != size:
        method = {"area": cv2.INTER_AREA, "cubic": cv2.INTER_CUBIC, "lanczos4": cv2.INTER_LANCZOS4}[interpolation]
        return cv2.resize(image, size, interpolation=method)
    return resize(image, size, interpolation)


def _cut(image: np.ndarray, step: int) -> np.ndarray:
    """The middle, of sides that are multiples of `step`."""
    height, width = (side - side % step for side in image.shape[:2])
    top, left = ((whole - side) // 2 for whole, side in zip(image.shape[:2], (height, width), strict=True))
    return image[top : top + height, left : left + width]


def _copy(path: Path, target: Path) -> None:
    try:
        shutil.copy(path, target)
    except OSError as error:
        raise OptionError(
            "", f"{path} can't be copied to {target} ({error.strerror})", "mend that, or remove it"
        ) from None


TOOL = Tool(__doc__, ResizeOptions, shrink, positionals=(SOURCE, TARGET))

if __name__ == "__main__":
    sys.exit(TOOL.run())
