"""Options of the models: which files, which kind, how text is encoded."""

from __future__ import annotations

from dataclasses import dataclass

from library.options import opt, require

SDXL_BUCKET_STEP = 32  # pixels: the VAE's factor of 8 and two halvings in the U-Net


@dataclass(frozen=True)
class ModelOptions:
    """The base model."""

    pretrained_model_name_or_path: str | None = opt(
        help="base model: a .safetensors or .ckpt file, a Diffusers folder, or a hub id (only this uses the network)"
    )
    v2: bool = opt(False, help="assert that the model is Stable Diffusion 2.x (found from the file in any case)")
    v_parameterization: bool = opt(
        False, help="the model predicts velocity (SD 2.x 768-v); found from the file where it says so"
    )
    vae: str | None = opt(help="replace the VAE: a VAE file, a full checkpoint, a Diffusers folder or a hub id")
    no_half_vae: bool = opt(False, help="run the VAE in float32 whatever --mixed_precision says")
    may_inpaint: bool = False  # no option: whether inpainting models, of nine channels, are of use

    def __post_init__(self) -> None:
        require(
            bool(self.pretrained_model_name_or_path),
            "--pretrained_model_name_or_path",
            "no base model given",
            "name a .safetensors or .ckpt file, a Diffusers folder or a hub id",
        )


@dataclass(frozen=True)
class TextOptions:
    """How captions become conditioning."""

    clip_skip: int | None = opt(help="take the text encoder's n-th layer from the end (1 = the last)")
    max_token_length: int | None = opt(
        choices=[None, 75, 150, 225], help="longest caption in tokens; 75 without this option"
    )
    weighted_captions: bool = opt(
        False, help="captions hold emphasis, (word:1.2), (word) and [word], and BREAK, read as in prompts"
    )

    def __post_init__(self) -> None:
        require(
            self.clip_skip is None or 1 <= self.clip_skip <= 12,
            "--clip_skip",
            f"{self.clip_skip} is out of range",
            "use 1 to 12",
        )

    @property
    def token_windows(self) -> int:
        """Windows of 75 content tokens per caption."""
        return (self.max_token_length or 75) // 75

    @property
    def pads(self) -> bool:
        """Whether captions are filled up to whole windows."""
        return True


@dataclass(frozen=True)
class DreamBoothTextOptions(TextOptions):
    """How captions become conditioning."""

    no_token_padding: bool = opt(
        False, help="fill captions up only to the longest of their batch, as Diffusers' first DreamBooth script did"
    )

    @property
    def pads(self) -> bool:
        return not self.no_token_padding
