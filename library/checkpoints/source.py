"""Where a model came from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelSource:
    """Where a model came from, as far as saving and metadata need it."""

    path: str  # as the user gave it
    kind: str  # "sd1" | "sd2" | "sdxl"
    is_single_file: bool
    v_prediction: bool
    zero_terminal_snr: bool = False  # its last timestep is pure noise (Lin et al. 2023), as the model itself says
    in_channels: int = 4  # of the U-Net; 9 for inpainting models, which are told a mask and a picture beside latents
