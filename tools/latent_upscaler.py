"""Enlarge pictures to twice their size by the latent upscaler. See docs/models_and_loras.md.

It is an upscaler of the generators' highres fix as well:

    --highres_fix_upscaler tools.latent_upscaler --highres_fix_upscaler_args "weights=latent_upscaler.safetensors"
"""

from __future__ import annotations

import glob
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __package__ in (None, ""):  # started as a file: the repository's folder is where library is
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.checkpoints.probe import check_vae
from library.cli.output_places import output_folder
from library.cli.picture_folders import LeftOut, encoded, refuse_equal, write_picture
from library.cli.tools import Tool
from library.data.headers import BadImage, read_header
from library.data.listing import is_image
from library.options import OptionError, opt, require
from library.progress import progress_bar
from library.wording import counted

if TYPE_CHECKING:
    from PIL.Image import Image

    from library.generate.latent_upscaler import LatentUpscaler

logger = logging.getLogger(__name__)

OF_HIGHRES_FIX = "--highres_fix_upscaler_args weights"
VAE, PATTERN, TARGET = "--vae_path", "--image_pattern", "--output_dir"
FACTOR = 2
UPSCALED, ENLARGED = "_upscaled", "_enlarged"


@dataclass(frozen=True)
class UpscaleOptions:
    """What is enlarged, and by which files."""

    vae_path: str = opt("", help="VAE: a file, a Diffusers folder (itself or its vae), a checkpoint, a hub id")
    weights: str = opt("", help="file of the latent upscaler")
    image_pattern: str = opt("", help='pictures, for example "pictures/*.png"')
    output_dir: str = opt(".", help="folder to write to, under the names of the pictures with _upscaled")
    batch_size: int = opt(4, help="pictures of one size that the upscaler takes at once")
    vae_batch_size: int = opt(1, help="pictures of one size that the VAE takes at once")
    debug: bool = opt(False, help="also write what comes of a picture without the upscaler, with _enlarged")

    def __post_init__(self) -> None:
        for name in ("batch_size", "vae_batch_size"):
            require(getattr(self, name) >= 1, f"--{name}", f"{getattr(self, name)} is no number of pictures")


def create_upscaler(*, weights: str | None = None) -> LatentUpscaler:
    """For highres fix, see library.generate.highres; raises OptionError for what is no file of a latent upscaler."""
    from library.generate.latent_upscaler import load_upscaler

    if not weights:
        raise OptionError(OF_HIGHRES_FIX, "no file given", 'use --highres_fix_upscaler_args "weights=FILE"')
    return load_upscaler(weights, OF_HIGHRES_FIX)


def upscale(options: UpscaleOptions) -> None:
    """Raises OptionError for files that can't be used, and, when all others are done, for pictures that can't."""
    paths = pictures_of(options.image_pattern)
    place = output_folder(options.output_dir, TARGET, Path(), may_be_source=True)
    _refuse_inputs(paths, place, options)
    check_vae(options.vae_path, VAE)
    if not Path(options.weights).expanduser().is_file():
        raise OptionError("--weights", f"{options.weights} is no file", "name the file of a latent upscaler")
    left_out = LeftOut()
    sizes = {}
    for path in paths:
        try:
            sizes[path] = read_header(str(path)).size_wh
        except BadImage as error:
            left_out.note(path, error)
    if sizes:
        _upscale(sizes, place, options, left_out)
    done = counted(len(paths) - len(left_out.reasons), "picture")
    logger.info("%s in %s", done, place.resolve())
    left_out.tell(len(paths), PATTERN)


def pictures_of(pattern: str) -> list[Path]:
    """The pictures that fit; OptionError where there are none."""
    found = [Path(name) for name in sorted(glob.glob(str(Path(pattern).expanduser()), recursive=True))]
    paths = [path for path in found if path.is_file() and is_image(path.name)]
    if not paths:
        folder = next((path for path in found if path.is_dir()), None)
        way_out = f'write "{folder}/*.png"' if folder else 'check it, and put it in quotes: "pictures/*.png"'
        raise OptionError(PATTERN, f"{pattern!r} fits no picture", way_out)
    return paths


def _refuse_inputs(paths: Sequence[Path], place: Path, options: UpscaleOptions) -> None:
    refuse_equal(paths, lambda path: path.name, PATTERN)
    inputs = {path.resolve() for path in paths}
    for path in paths:
        for suffix in (UPSCALED, ENLARGED) if options.debug else (UPSCALED,):
            if (place / f"{path.stem}{suffix}{path.suffix}").resolve() in inputs:
                problem = f"{path.stem}{suffix}{path.suffix} is one of the pictures that are read"
                raise OptionError(TARGET, problem, "choose another folder, or a pattern that leaves it out")


def _upscale(sizes: Mapping[Path, tuple[int, int]], place: Path, options: UpscaleOptions, left_out: LeftOut) -> None:
    """Pictures of one size at a time."""
    import torch

    from library.families.base import LoadPlan
    from library.families.sd_parts import load_vae
    from library.generate.latent_upscaler import enlarged, load_upscaler
    from library.models.vae import downscaling

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    vae: Any = load_vae(options.vae_path, LoadPlan(unet=dtype, text_encoders=dtype, vae=dtype, device=device))
    upscaler = load_upscaler(str(Path(options.weights).expanduser()), "--weights").to(device, dtype)
    step = downscaling(vae)
    with progress_bar(desc="upscaling", total=len(sizes), unit="picture") as bar:
        for size, paths in groups(sizes, step, options.batch_size):
            images: dict[Path, Image] = {}
            for path in paths:
                try:
                    images[path] = _cut(path, size)
                except BadImage as error:
                    left_out.note(path, error)
            for path, image in zip(images, _upscaled(vae, upscaler, list(images.values()), options), strict=True):
                _write(place, path, UPSCALED, image)
                if options.debug:
                    _write(place, path, ENLARGED, enlarged(images[path], FACTOR * size[0], FACTOR * size[1]))
            bar.update(len(paths))


def groups(
    sizes: Mapping[Path, tuple[int, int]], step: int, count: int
) -> Iterator[tuple[tuple[int, int], list[Path]]]:
    """(width, height) that is cut to, and up to `count` pictures of it. Sides are multiples of `step`."""
    by_size: dict[tuple[int, int], list[Path]] = {}
    for path, (width, height) in sizes.items():
        by_size.setdefault((width - width % step, height - height % step), []).append(path)
    for size, paths in by_size.items():
        for start in range(0, len(paths), count):
            yield size, paths[start : start + count]


def _cut(path: Path, size: tuple[int, int]) -> Image:
    from PIL import Image

    from library.data.images import upright_picture

    if not all(size):
        raise BadImage("is smaller than a latent pixel")
    return Image.fromarray(upright_picture(str(path)).rgb_HWC).crop((0, 0, *size))


def _upscaled(vae: Any, upscaler: LatentUpscaler, images: Sequence[Image], options: UpscaleOptions) -> list[Image]:
    """Of equal size."""
    import torch
    from PIL import Image

    from library.generate.denoise import pixels_of

    if not images:
        return []
    width, height = images[0].size
    dtype = next(vae.parameters()).dtype
    at_once = options.vae_batch_size
    scaled_BChw = upscaler.upscale(
        vae, images, None, dtype, FACTOR * width, FACTOR * height, batch_size=options.batch_size, vae_batch_size=at_once
    )
    latents_BChw = scaled_BChw.float() / vae.config.scaling_factor
    with torch.no_grad():
        return [Image.fromarray(pixels_HWC.numpy()) for pixels_HWC in pixels_of(vae, latents_BChw, at_once)]


def _write(place: Path, path: Path, suffix: str, image: Image) -> None:
    write_picture(place / f"{path.stem}{suffix}{path.suffix}", encoded(image, path.suffix), TARGET)


TOOL = Tool(
    __doc__,
    UpscaleOptions,
    upscale,
    required=("vae_path", "weights", "image_pattern"),
    renamed={"--vae:": f"{VAE}:"},  # of code that is shared with the trainers
)

if __name__ == "__main__":
    sys.exit(TOOL.run())
