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

from library.data.option_values import parse_extension, parse_range, parse_resolution, parse_table
from library.options import OptionError, opt, path_of, require

LATENT_STRIDE = 8  # pixels per latent pixel: every trained size is a multiple of it
MAX_SIDE = 16_384  # pixels: beyond any model, but a slip of the keyboard
MOST_REPEATS = 10_000  # of an image in an epoch: beyond any use, but a date in the name of a folder


@dataclass(frozen=True)
class SourceOptions:
    """Where the training images are."""

    train_data_dir: str | None = opt(
        help="folder whose sub-folders are named <repeats>_<class>, or a folder of images (repeats 1)"
    )
    reg_data_dir: str | None = opt(help="regularisation images, in sub-folders named <repeats>_<class>")
    dataset_config: Path | None = opt(help="dataset file (.toml or .json) in place of --train_data_dir")
    in_json: str | None = opt(
        help="metadata file (.json, .jsonl or .parquet) with captions and tags; its images are in --train_data_dir"
    )
    dataset_repeats: int = opt(
        1, help="how often every image is shown per epoch, where neither a folder's name nor the dataset file says it"
    )
    dataset_class: str | None = opt(
        help="package.module.Class: a dataset of your own in place of folders; its items are whole batches"
    )
    debug_dataset: bool = opt(
        False, help="no training: write what the first epoch's samples look like, as pictures and a table, and end"
    )
    on_bad_image: str = opt(
        "stop", choices=("stop", "skip"), help="broken images: list them and stop, or list them and train without"
    )

    def __post_init__(self) -> None:
        repeats = self.dataset_repeats
        require(repeats >= 1, "--dataset_repeats", f"{repeats} is no number of showings", "use 1 or more")
        check_repeats(repeats, "--dataset_repeats")

    def given(self, *names: str) -> list[str]:
        """The flags of these options that were given a value."""
        return [f"--{name}" for name in names if getattr(self, name)]


def check_repeats(repeats: int, where: str) -> None:
    """Raise OptionError for more showings in an epoch than anybody means."""
    require(repeats <= MOST_REPEATS, where, f"{repeats} is too often", f"use {MOST_REPEATS} or less, and more epochs")


@dataclass(frozen=True)
class FolderOptions:
    """One folder of images, or one metadata file (keys of [[datasets.subsets]] that have no flag)."""

    image_dir: Path | None = opt(parse=path_of, help="the folder of images; its sub-folders are not looked at")
    num_repeats: int = opt(1, help="how often every image is shown per epoch")
    class_tokens: str | None = opt(help="caption of images that have no caption file")
    is_reg: bool = opt(False, help="regularisation images")
    metadata_file: Path | None = opt(
        parse=path_of,
        help="metadata file (.json, .jsonl or .parquet): its entries name images and give captions and tags",
    )
    custom_attributes: dict[str, Any] | None = opt(
        parse=parse_table, help="a table of your own; kept with the subset, changes nothing"
    )

    def __post_init__(self) -> None:
        check_repeats(self.num_repeats, "--num_repeats")


@dataclass(frozen=True)
class DatasetOptions:
    """Keys of [[datasets]] that have no flag."""

    network_multiplier: float = opt(1.0, help="strength of the network while it is trained on this dataset's images")

    def __post_init__(self) -> None:
        multiplier = self.network_multiplier
        require(multiplier != 0, "--network_multiplier", "0 would train nothing", "leave the dataset out")


@dataclass(frozen=True)
class ValidationSplitOptions:
    """Images held out for validation."""

    validation_split: float = opt(
        0.0, help="share of the images (0-1) that is never trained on, but measured; 1 in a dataset of its own"
    )
    validation_seed: int | None = opt(
        help="decides which images are held out, and their noise; --seed without this option"
    )

    def __post_init__(self) -> None:
        split, seed = self.validation_split, self.validation_seed
        require(0 <= split <= 1, "--validation_split", f"{split} is out of range", "use 0 to 1; 0.1 is usual")
        require(seed is None or 0 <= seed < 2**63, "--validation_seed", f"{seed} is out of range", "use 0 to 2^63 - 1")

    def without_effect(self, *, is_split: bool) -> list[str]:
        """A sentence for each option that does nothing; `is_split` says whether any dataset holds images out."""
        if is_split:
            return []
        if self.validation_split:
            return ["--validation_split has no effect: the dataset's own setting is 0, or it is of a class of its own"]
        return ["--validation_seed has no effect without --validation_split"] * (self.validation_seed is not None)


BUCKET_SIDES = ("min_bucket_reso", "max_bucket_reso", "bucket_reso_steps")


@dataclass(frozen=True)
class BucketOptions:
    """Training sizes."""

    resolution: tuple[int, int] | None = opt(
        cli=str,
        parse=parse_resolution,
        help='training size, a multiple of 8: "512" or "width,height"; with buckets, the area, of any sides',
    )
    enable_bucket: bool = opt(False, help="train each image near its own aspect ratio, in buckets of equal size")
    min_bucket_reso: int = opt(256, help="shortest side of a bucket")
    max_bucket_reso: int = opt(1024, help="longest side of a bucket")
    bucket_reso_steps: int = opt(64, help="bucket sides are multiples of this; a multiple of 8")
    bucket_no_upscale: bool = opt(False, help="never enlarge: buckets follow the images, min and max are not used")

    def __post_init__(self) -> None:
        for side in self.resolution or ():
            require(side > 0, "--resolution", f"{side} is no size", "512 is usual for SD 1.x")
        require(self.bucket_reso_steps > 0, "--bucket_reso_steps", f"{self.bucket_reso_steps} is no step", "use 64")
        require(self.min_bucket_reso > 0, "--min_bucket_reso", f"{self.min_bucket_reso} is no size")
        require(self.max_bucket_reso > 0, "--max_bucket_reso", f"{self.max_bucket_reso} is no size")
        for name in ("resolution", "min_bucket_reso", "max_bucket_reso", "bucket_reso_steps"):
            value = getattr(self, name)
            largest = max(value) if isinstance(value, tuple) else value or 0
            require(largest <= MAX_SIDE, f"--{name}", f"{largest} is too large", f"the largest is {MAX_SIDE}")

    @property
    def side_step(self) -> int:
        """--bucket_reso_steps as the model can use it: the next multiple of 8."""
        return -(-self.bucket_reso_steps // LATENT_STRIDE) * LATENT_STRIDE

    def without_effect(self) -> list[str]:
        """A sentence for each option that another one would have to go with, or that is not used as it is."""
        sentences = []
        if self.bucket_no_upscale and not self.enable_bucket:
            sentences.append("--bucket_no_upscale has no effect without --enable_bucket")
        given = [f"--{name}" for name in BUCKET_SIDES if getattr(self, name) != getattr(BucketOptions, name)]
        if given and not self.enable_bucket:
            verb = "has" if len(given) == 1 else "have"
            sentences.append(f"{', '.join(given)} {verb} no effect without --enable_bucket")
        if self.side_step != self.bucket_reso_steps and self.enable_bucket:
            given = self.bucket_reso_steps
            sentences.append(f"--bucket_reso_steps {given}: {self.side_step} is used, sides are multiples of 8")
        return sentences

    def check(self, where: Callable[[str], str] = "--{}".format) -> None:
        """The rules between these options, on the values one dataset really uses; `where` names an option's place."""
        if self.resolution is None:
            raise OptionError(
                where("resolution"), "is not given", "512 is usual for SD 1.x, 768 for SD 2.x, 1024 for SDXL"
            )
        low, high, step = self.min_bucket_reso, self.max_bucket_reso, self.side_step
        if not self.enable_bucket:
            for side in self.resolution:
                nearest = max(1, round(side / LATENT_STRIDE)) * LATENT_STRIDE
                way_out = f"use {nearest}, or enable_bucket"
                require(side % LATENT_STRIDE == 0, where("resolution"), f"{side} is not a multiple of 8", way_out)
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
    cache_info: bool = opt(
        False, help="write the images' sizes and captions into metadata_cache.json of their folder, for other programs"
    )
    data_index: str = opt(
        "auto",
        choices=("auto", "on", "off"),
        help="note what was read of images and captions in a hidden file of their folder, so that the next start is "
        "quick; auto: in folders of 1000 files and more",
    )
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
    caption_separator: str = opt(",", help="what stands between the parts of a caption")
    keep_tokens_separator: str | None = opt(
        help="text in captions that divides kept parts from others: kept ||| loose, or kept ||| loose ||| kept at the "
        "end; overrides --keep_tokens for captions that have it"
    )
    secondary_separator: str | None = opt(
        help="text that becomes the separator after shuffling, so that parts joined by it stay together"
    )
    enable_wildcard: bool = opt(
        False, help="{a|b|c} in captions is one of its alternatives, and caption files of several lines give one line"
    )

    def __post_init__(self) -> None:
        for name in ("caption_dropout_rate", "caption_tag_dropout_rate"):
            rate = getattr(self, name)
            require(0 <= rate <= 1, f"--{name}", f"{rate} is out of range", "use 0 to 1")
        for name in ("keep_tokens", "caption_dropout_every_n_epochs", "token_warmup_min", "token_warmup_step"):
            value = getattr(self, name)
            require(0 <= value < math.inf, f"--{name}", f"{value} is out of range", "use 0 or more")
        require(bool(self.caption_separator), "--caption_separator", "is an empty text", 'the usual one is ","')
        for name in ("keep_tokens_separator", "secondary_separator"):
            separator = getattr(self, name)
            same = separator == self.caption_separator
            require(not same, f"--{name}", f"{separator!r} is the caption separator too", "choose another text")
        kept, secondary = self.keep_tokens_separator, self.secondary_separator
        require(not kept or kept != secondary, "--secondary_separator", f"{secondary!r} is --keep_tokens_separator too")

    @property
    def varies_parts(self) -> bool:
        """Whether captions are taken apart each time they are drawn."""
        return bool(self.shuffle_caption or self.token_warmup_step > 0 or self.caption_tag_dropout_rate > 0)

    @property
    def joint(self) -> str:
        """What stands between parts that are joined again: the separator, with a blank."""
        return self.caption_separator if self.caption_separator[-1].isspace() else f"{self.caption_separator} "

    def without_effect(self) -> list[str]:
        """A sentence for each option that another one would have to go with."""
        sentences = []
        if self.keep_tokens and not self.varies_parts:
            needed = "--shuffle_caption, --caption_tag_dropout_rate or --token_warmup_step"
            sentences.append(f"--keep_tokens {self.keep_tokens} has no effect without {needed}")
        if self.keep_tokens_separator and not self.varies_parts:
            needed = "--shuffle_caption, --caption_tag_dropout_rate or --token_warmup_step"
            sentences.append(f"--keep_tokens_separator is only taken out of captions without {needed}")
        if self.token_warmup_min != 1 and not self.token_warmup_step:
            sentences.append(f"--token_warmup_min {self.token_warmup_min} has no effect without --token_warmup_step")
        return sentences


@dataclass(frozen=True)
class AugmentOptions:
    """How images are varied."""

    color_aug: bool = opt(False, help="now and then a slight change of hue or gamma; not with cached latents")
    flip_aug: bool = opt(False, help="mirror half of the draws horizontally")
    random_crop: bool = opt(False, help="cut at a random place in place of the centre; not with cached latents")
    face_crop_aug_range: tuple[float, float] | None = opt(
        cli=str,
        parse=parse_range,
        help="images named name_cx_cy_w_h: cut around that face, the short side lo to hi times its size; two numbers "
        "lo,hi; without buckets and cached latents",
    )
    resize_interpolation: str | None = opt(
        choices=["lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area", "box"],
        help="how images are resized; without it by area when they shrink and by Lanczos when they grow",
    )

    def __post_init__(self) -> None:
        low, high = self.face_crop_aug_range or (1.0, 1.0)
        where, given = "--face_crop_aug_range", f"{low:g},{high:g}"
        require(low > 0, where, f"{given} is out of range", "use numbers above 0, such as 1.5,3.0")
        require(low <= high, where, f"{given}: the first number is above the second", f"write {high:g},{low:g}")


@dataclass(frozen=True)
class MaskOptions:
    """Parts of images that don't count in the loss."""

    alpha_mask: bool = opt(
        False, help="weigh the loss by the images' alpha channel: what is transparent is not learned"
    )
    conditioning_data_dir: Path | None = opt(
        cli=str,
        parse=path_of,
        help="with --masked_loss: folder of masks, pictures with the names of the images: white counts, black does not",
    )

    @property
    def enabled(self) -> bool:
        return self.alpha_mask or self.conditioning_data_dir is not None


@dataclass(frozen=True)
class CacheOptions:
    """Caching of latents."""

    cache_latents: bool = opt(False, help="encode every image once, before training, and keep the latents in memory")
    cache_latents_to_disk: bool = opt(False, help="keep the latents in .npz files next to the images")
    vae_batch_size: int = opt(1, help="images encoded at once while caching")
    skip_cache_check: bool = opt(False, help="take cache files as they are at the start, without reading them")
    cache_format: str = opt(
        "npz", choices=["npz", "packed"], help="on disk: a .npz file for each image, or a .pack file for each size"
    )

    def __post_init__(self) -> None:
        require(
            self.vae_batch_size >= 1, "--vae_batch_size", f"{self.vae_batch_size} is no batch size", "use 1 or more"
        )

    @property
    def enabled(self) -> bool:
        """Whether latents are cached at all: on disk implies it."""
        return self.cache_latents or self.cache_latents_to_disk

    def notes(self) -> list[str]:
        """A sentence for each setting that has no effect beside another."""
        idle = ["vae_batch_size"] if self.vae_batch_size != 1 and not self.enabled else []
        if not self.cache_latents_to_disk:
            idle += ["skip_cache_check"] * self.skip_cache_check + ["cache_format"] * self.is_packed
        return [f"--{name} has no effect without cached latents{' on disk' * ('cache' in name)}" for name in idle]

    @property
    def is_packed(self) -> bool:
        return self.cache_format == "packed"


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
