"""Options of the tool that prepares a metadata file's images for fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from library.data.option_values import parse_resolution
from library.data.options import BucketOptions
from library.options import opt, path_of, require


@dataclass(frozen=True)
class PreparedFiles:
    """What is read and written."""

    train_data_dir: Path = opt(cli=str, parse=path_of, help="folder of the images")
    in_json: Path = opt(cli=str, parse=path_of, help="metadata file that names them")
    out_json: Path = opt(cli=str, parse=path_of, help="metadata file to write, may be the same")
    model_name_or_path: str = opt(help="VAE: a VAE file, a checkpoint, a Diffusers folder or a hub id")


@dataclass(frozen=True)
class PreparingOptions:
    """Sizes and latents of a metadata file's images."""

    v2: bool = opt(False, help="without effect: a VAE is the same for every kind of model")
    batch_size: int = opt(1, help="images encoded at once")
    max_data_loader_n_workers: int | None = opt(help="without effect: images are decoded on every core")
    max_resolution: tuple[int, int] = opt(
        (512, 512), cli=str, parse=parse_resolution, help='training size, "width,height": the area of the buckets'
    )
    min_bucket_reso: int = opt(256, help="shortest side of a bucket")
    max_bucket_reso: int = opt(1024, help="longest side of a bucket")
    bucket_reso_steps: int = opt(64, help="bucket sides are multiples of this; a multiple of 8")
    bucket_no_upscale: bool = opt(False, help="never enlarge: buckets follow the images, min and max are not used")
    mixed_precision: str = opt(
        "no", choices=["no", "fp16", "bf16"], help="precision of the VAE; that of SDXL is never in fp16"
    )
    full_path: bool = opt(False, help="without effect: keys of the metadata are found as paths and as names")
    flip_aug: bool = opt(False, help="also encode the mirrored image")
    alpha_mask: str = opt("", help="any text: also keep the alpha channel, for --alpha_mask of the training")
    skip_existing: bool = opt(
        False,
        help="also leave cache files of other programs as they are, if they fit: nothing in them says what made them. "
        "Files that prove to be of the same image, VAE and settings are never made anew",
    )
    recursive: bool = opt(False, help="without effect: keys of the metadata lead to images in any folder")
    on_bad_image: str = opt(
        "stop", choices=("stop", "skip"), help="broken images: list them and stop, or list them and do the others"
    )

    def __post_init__(self) -> None:
        require(self.batch_size >= 1, "--batch_size", f"{self.batch_size} is no batch size", "use 1 or more")
        self.bucket.check()

    @property
    def bucket(self) -> BucketOptions:
        """The same as training has it."""
        return BucketOptions(
            self.max_resolution,
            True,
            self.min_bucket_reso,
            self.max_bucket_reso,
            self.bucket_reso_steps,
            self.bucket_no_upscale,
        )

    def notes(self) -> list[str]:
        """A sentence for each setting that has no effect."""
        reasons = {
            "v2": "a VAE is the same for every kind of model",
            "max_data_loader_n_workers": "images are decoded on every core",
            "full_path": "keys of the metadata are found as paths and as names",
            "recursive": "keys of the metadata lead to images in any folder",
        }
        return [f"--{name} has no effect: {why}" for name, why in reasons.items() if getattr(self, name)]
