"""From image files to training pixels.

Images are (H, W, 3) uint8 arrays in RGB order until `to_tensor`.
"""

from __future__ import annotations

import io
import os
import random
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from library.data.buckets import Cut, Placement, central_cut
from library.data.headers import BadImage, open_image, read_header
from library.data.progress import progress

if TYPE_CHECKING:
    import torch

UPRIGHT = {  # Exif orientation -> how the stored picture becomes upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
RESAMPLING = {  # Pillow's ways by name of --resize_interpolation; unlike OpenCV's they see all pixels when they shrink
    "lanczos": Image.Resampling.LANCZOS,
    "bicubic": Image.Resampling.BICUBIC,
    "cubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "linear": Image.Resampling.BILINEAR,
    "box": Image.Resampling.BOX,
    "nearest": Image.Resampling.NEAREST,
}
CHECKED_TOGETHER = 32  # images per task of a thread
COLOR_AUG_RATE = 0.33
MAX_HUE_SHIFT = 8  # of OpenCV's 180 hue values
GAMMA_RANGE = (0.95, 1.05)

Note = Callable[[str, Image.Image], None]


class Picture(NamedTuple):
    """A decoded image, upright."""

    rgb_HWC: np.ndarray
    alpha_HW: np.ndarray | None  # uint8, 255 where opaque; None for a picture that can't be transparent


def load_picture(source: str | bytes, orientation: int = 1, *, background: str = "white") -> Picture:
    """The upright picture with transparent parts on `background`; `source` is a path or the file's bytes.

    Raises BadImage with the reason.
    """
    try:
        with open_image(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            layers = _layers(image, background)
            if orientation in UPRIGHT:
                layers = [layer.transpose(UPRIGHT[orientation]) for layer in layers]
            return Picture(np.asarray(layers[0]), np.asarray(layers[1]) if layers[1:] else None)
    except Exception as error:  # Pillow's plug-ins raise OSError, SyntaxError, ValueError, struct.error ...
        raise BadImage(reason(error)) from None


def upright_picture(path: str) -> Picture:
    """The picture of a file as people see it; raises BadImage with the reason."""
    return load_picture(path, read_header(path).orientation)


def reason(error: Exception) -> str:
    """Why a file can't be read, in words that don't repeat its path."""
    if isinstance(error, UnidentifiedImageError):
        return "is not an image, or of a kind that this Pillow can't read"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def to_rgb(image: Image.Image) -> Image.Image:
    """A stored picture as RGB, transparent parts on white."""
    return _layers(image, "white")[0]


def _layers(image: Image.Image, background: str) -> list[Image.Image]:
    """[RGB] or, for a picture with transparency, [RGB, alpha]."""
    if image.mode.startswith("I"):  # 16 bits of grey; Pillow's own conversion would clip at 255
        grey = np.asarray(image).astype(np.int64).clip(0, 0xFFFF) >> 8
        return [Image.fromarray(grey.astype(np.uint8)).convert("RGB")]
    if image.mode == "F":  # Pillow's own conversion takes 0 to 255, while most such files go from 0 to 1
        grey = np.nan_to_num(np.asarray(image), posinf=np.inf, neginf=-np.inf)
        grey = (grey * (255 if grey.max() <= 1 else 1)).clip(0, 255).round()
        return [Image.fromarray(grey.astype(np.uint8)).convert("RGB")]
    if image.has_transparency_data:
        image = image.convert("RGBA")
        on_background = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
        return [on_background.convert("RGB"), image.getchannel("A")]
    return [image.convert("RGB")]


def place(image: np.ndarray, placement: Placement) -> np.ndarray:
    """Resized and cut to the bucket in its centre."""
    return cut_out(image, central_cut(placement), placement.interpolation)


def cut_out(image: np.ndarray, cut: Cut, interpolation: str | None = None) -> np.ndarray:
    """Resized and cut."""
    width, height = cut.size_wh
    return resize(image, cut.resized_wh, interpolation)[cut.y : cut.y + height, cut.x : cut.x + width]


def resize(image: np.ndarray, size_wh: tuple[int, int], interpolation: str | None = None) -> np.ndarray:
    """In the way named; else by area when both sides shrink and by Lanczos when not: averaging enlarges to blocks."""
    height, width = image.shape[:2]
    if (width, height) == size_wh:
        return image
    shrinks = size_wh[0] <= width and size_wh[1] <= height
    if (interpolation or ("area" if shrinks else "lanczos")) == "area":
        return cv2.resize(image, size_wh, interpolation=cv2.INTER_AREA)
    return np.asarray(Image.fromarray(image).resize(size_wh, RESAMPLING[interpolation or "lanczos"]))


def augment_color(image: np.ndarray, draw: random.Random) -> np.ndarray:
    """One time in three, a slight shift of hue or change of gamma."""
    if draw.random() > COLOR_AUG_RATE:
        return image
    if draw.random() > 0.5:
        hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
        shift = draw.uniform(-MAX_HUE_SHIFT, MAX_HUE_SHIFT)
        hsv[..., 0] = np.mod(hsv[..., 0] + shift, 180).astype(np.uint8)
        return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    gamma = draw.uniform(*GAMMA_RANGE)
    table = (np.arange(256, dtype=np.float64) ** gamma).clip(0, 255).astype(np.uint8)
    return table[image]


def to_tensor(image: np.ndarray) -> torch.Tensor:
    """(3, H, W) float32 in [-1, 1]."""
    import torch  # here: tools that only change pictures do without

    pixels_CHW = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return pixels_CHW.float().div_(255).sub_(0.5).div_(0.5).contiguous()


def usable_cores() -> int:
    """The processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def find_broken(paths: Iterable[str], note: Note = lambda path, image: None) -> dict[str, str]:
    """Paths of images that can't be decoded to the end, with the reason; on all cores.

    `note` is shown every image that can, from several threads, while its pixels are at hand (a JPEG's at an eighth).
    Checksums alone would not do: a PNG may have right ones around too few pixels, or around none that it can have.
    """
    paths = list(paths)
    chunks = [paths[start : start + CHECKED_TOGETHER] for start in range(0, len(paths), CHECKED_TOGETHER)]
    broken: dict[str, str] = {}

    def check(chunk: list[str]) -> list[str | None]:
        return [_why_broken(path, note) for path in chunk]

    with progress("checking images", len(paths)) as bar, ThreadPoolExecutor(usable_cores()) as pool:
        for chunk, reasons in zip(chunks, pool.map(check, chunks), strict=True):
            broken |= {path: reason for path, reason in zip(chunk, reasons, strict=True) if reason}
            bar.update(len(chunk))
    return broken


def _why_broken(path: str, note: Note) -> str | None:
    try:
        with open(path, "rb") as file:
            content = file.read()
        with open_image(io.BytesIO(content)) as image:
            # a JPEG decoded at an eighth of its size is read to the end as well, at half the cost
            image.draft(image.mode, (max(1, image.width // 8), max(1, image.height // 8)))
            image.load()
            note(path, image)
    except Exception as error:
        return reason(error)
    return None
