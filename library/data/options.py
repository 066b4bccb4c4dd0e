"""Options of the training data: where images are, buckets, captions, augmentation, caching, loading.

Flag name = TOML key, with one exception of the trade: --train_batch_size is `batch_size` in a dataset file.
Checks that need several options at once run on the merged values of one dataset (`BucketOptions.check`), because a
dataset file may correct what the command line alone would get wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.options import OptionError, opt, path_of, require

LATENT_STRIDE = 8  # pixels per latent pixel: every trained size is a multiple of it
MAX_SIDE = 16_384  # pixels: beyond any model, but a slip of the keyboard


def parse_resolution(value: Any) -> tuple[int, int]:
    """ "512" or "512,768" on the command line, 512 or [512, 768] in TOML, as (width, height)."""
    parts = value.split(",") if isinstance(value, str) else value if isinstance(value, (list, tuple)) else [value]
    try:
        sizes = [int(part) if isinstance(part, str) else part for part in parts]
    except ValueError:
        raise ValueError("is not a size; write one number (512) or width,height (512,768)") from None
    if len(sizes) not in (1, 2) or any(type(size) is not int for size in sizes):
        raise ValueError("is not a size; write one whole number or two, width and height")
    return (sizes[0], sizes[-1])


def parse_extension(value: Any) -> str:
    """ ".txt" from ".txt" or "txt"."""
    if not isinstance(value, str) or not value.strip("."):
        raise ValueError("is not a file extension such as .txt")
    return value if value.startswith(".") else f".{value}"


@dataclass(frozen=True)
class SourceOptions:
    """Where the training images are."""

    train_data_dir: str | None = opt(
        help="folder whose sub-folders are named <repeats>_<class>, or a folder of images (repeats 1)"
    )
    reg_data_dir: str | None = opt(help="regularisation images, in sub-folders named <repeats>_<class>")
    dataset_config: Path | None = opt(help="dataset file (.toml or .json) in place of --train_data_dir")
    on_bad_image: str = opt(
        "stop", choices=("stop", "skip"), help="broken images: list them and stop, or list them and train without"
    )


@dataclass(frozen=True)
class FolderOptions:
    """One folder of images (keys of [[datasets.subsets]] that have no flag)."""

    image_dir: Path | None = opt(parse=path_of, help="the folder of images; its sub-folders are not looked at")
    num_repeats: int = opt(1, help="how often every image is shown per epoch")
    class_tokens: str | None = opt(help="caption of images that have no caption file")
    is_reg: bool = opt(False, help="regularisation images")


@dataclass(frozen=True)
class BucketOptions:
    """Training sizes."""

    resolution: tuple[int, int] | None = opt(
        cli=str, parse=parse_resolution, help='training size: "512" or "width,height"; with buckets, the area'
    )
    enable_bucket: bool = opt(False, help="train each image near its own aspect ratio, in buckets of equal size")
    min_bucket_reso: int = opt(256, help="shortest side of a bucket")
    max_bucket_reso: int = opt(1024, help="longest side of a bucket")
    bucket_reso_steps: int = opt(64, help="bucket sides are multiples of this; a multiple of 8")
    bucket_no_upscale: bool = opt(False, help="never enlarge: buckets follow the images, min and max are not used")

    def __post_init__(self) -> None:
        for side in self.resolution or ():
            require(side > 0, "--resolution", f"{side} is no size", "512 is usual for SD 1.x")
            nearest = max(1, round(side / LATENT_STRIDE)) * LATENT_STRIDE
            require(side % LATENT_STRIDE == 0, "--resolution", f"{side} is not a multiple of 8", f"use {nearest}")
        step = self.bucket_reso_steps
        require(
            step > 0 and step % LATENT_STRIDE == 0,
            "--bucket_reso_steps",
            f"{step} is not a multiple of 8",
            "64 is usual",
        )
        require(self.min_bucket_reso > 0, "--min_bucket_reso", f"{self.min_bucket_reso} is no size")
        for name in ("resolution", "min_bucket_reso", "max_bucket_reso", "bucket_reso_steps"):
            value = getattr(self, name)
            largest = max(value) if isinstance(value, tuple) else value or 0
            require(largest <= MAX_SIDE, f"--{name}", f"{largest} is too large", f"the largest is {MAX_SIDE}")

    def without_effect(self) -> list[str]:
        """A sentence for each option that another one would have to go with."""
        if self.bucket_no_upscale and not self.enable_bucket:
            return ["--bucket_no_upscale has no effect without --enable_bucket"]
        return []

    def check(self, where: Callable[[str], str] = "--{}".format) -> None:
        """The rules between these options, on the values one dataset really uses; `where` names an option's place."""
        if self.resolution is None:
            raise OptionError(where("resolution"), "is not given", "512 is usual for SD 1.x, 768 for SD 2.x")
        low, high, step = self.min_bucket_reso, self.max_bucket_reso, self.bucket_reso_steps
        if not self.enable_bucket:
            return
        require(
            min(self.resolution) >= step,
            where("bucket_reso_steps"),
            f"{step} is above the resolution {self.resolution}",
            f"use {min(self.resolution)} or less",
        )
        if self.bucket_no_upscale:
            return
        require(
            low >= step, where("min_bucket_reso"), f"{low} is below bucket_reso_steps {step}", f"use {step} or more"
        )
        require(low <= high, where("min_bucket_reso"), f"{low} is above max_bucket_reso {high}")
        require(
            low <= min(self.resolution),
            where("min_bucket_reso"),
            f"{low} is above the shorter side of resolution {self.resolution}",
            f"use {min(self.resolution)} or less",
        )
        require(
            high >= max(self.resolution),
            where("max_bucket_reso"),
            f"{high} is below the longer side of resolution {self.resolution}",
            f"use {max(self.resolution)} or more",
        )


@dataclass(frozen=True)
class CaptionOptions:
    """How captions are read and varied."""

    shuffle_caption: bool = opt(False, help="shuffle the comma-separated parts of the caption")
    caption_extension: str = opt(".caption", parse=parse_extension, help="extension of caption files")
    keep_tokens: int = opt(0, help="how many parts at the beginning are neither shuffled nor dropped")
    caption_prefix: str | None = opt(help="text put before every caption, with a blank")
    caption_suffix: str | None = opt(help="text put after every caption, with a blank")
    caption_dropout_rate: float = opt(0.0, help="share of captions replaced by the empty caption (0-1)")
    caption_dropout_every_n_epochs: int = opt(0, help="every n-th epoch uses empty captions; 0 switches it off")
    caption_tag_dropout_rate: float = opt(0.0, help="share of comma-separated parts left out (0-1)")
    token_warmup_min: int = opt(1, help="parts of the caption used at the first step of --token_warmup_step")
    token_warmup_step: float = opt(
        0, help="steps until the whole caption is used; below 1, a share of all training steps"
    )

    def __post_init__(self) -> None:
        for name in ("caption_dropout_rate", "caption_tag_dropout_rate"):
            rate = getattr(self, name)
            require(0 <= rate <= 1, f"--{name}", f"{rate} is out of range", "use 0 to 1")
        for name in ("keep_tokens", "caption_dropout_every_n_epochs", "token_warmup_min", "token_warmup_step"):
            value = getattr(self, name)
            require(0 <= value < math.inf, f"--{name}", f"{value} is out of range", "use 0 or more")

    def without_effect(self) -> list[str]:
        """A sentence for each option that another one would have to go with."""
        sentences = []
        if self.keep_tokens and not (self.shuffle_caption or self.caption_tag_dropout_rate):
            needed = "--shuffle_caption or --caption_tag_dropout_rate"
            sentences.append(f"--keep_tokens {self.keep_tokens} has no effect without {needed}")
        if self.token_warmup_min != 1 and not self.token_warmup_step:
            sentences.append(f"--token_warmup_min {self.token_warmup_min} has no effect without --token_warmup_step")
        return sentences


@dataclass(frozen=True)
class AugmentOptions:
    """How images are varied."""

    color_aug: bool = opt(False, help="now and then a slight change of hue or gamma; not with cached latents")
    flip_aug: bool = opt(False, help="mirror half of the draws horizontally")
    random_crop: bool = opt(False, help="cut at a random place in place of the centre; not with cached latents")


@dataclass(frozen=True)
class CacheOptions:
    """Caching of latents."""

    cache_latents: bool = opt(False, help="encode every image once, before training, and keep the latents in memory")
    cache_latents_to_disk: bool = opt(False, help="keep the latents in .npz files next to the images")
    vae_batch_size: int = opt(1, help="images encoded at once while caching")

    def __post_init__(self) -> None:
        require(
            self.vae_batch_size >= 1, "--vae_batch_size", f"{self.vae_batch_size} is no batch size", "use 1 or more"
        )

    @property
    def enabled(self) -> bool:
        """Whether latents are cached at all: on disk implies it."""
        return self.cache_latents or self.cache_latents_to_disk


@dataclass(frozen=True)
class LoaderOptions:
    """Batches."""

    train_batch_size: int = opt(1, help="images per batch and process")
    max_data_loader_n_workers: int = opt(
        8, help="at most this many data worker processes; the result never depends on it"
    )

    def __post_init__(self) -> None:
        size, workers = self.train_batch_size, self.max_data_loader_n_workers
        require(size >= 1, "--train_batch_size", f"{size} is no batch size", "use 1 or more")
        require(workers >= 0, "--max_data_loader_n_workers", f"{workers} is negative", "use 0 or more")
