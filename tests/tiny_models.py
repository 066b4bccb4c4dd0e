"""Tiny but complete Stable Diffusion checkpoints for tests: real layout, real vocabulary size, random weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from library.checkpoints.architecture import TextArchitecture, UNetArchitecture, VaeArchitecture
from library.checkpoints.keymaps import SDXL_CLIP_PREFIX, SDXL_OPENCLIP_PREFIX
from library.checkpoints.safetensors_io import save_file
from library.checkpoints.sd import ModelState, single_file_state
from library.models.build import SDXL_VAE_SCALE, VAE_SCALE, build_text_encoder, build_unet, build_vae

UNETS = {
    "sd1": UNetArchitecture(4, 4, (32, 64, 64, 64), (8, 8, 8, 8), (1, 1, 1, 0), 2, 64, linear_projection=False),
    "sd2": UNetArchitecture(4, 4, (64, 64, 128, 128), (1, 1, 2, 2), (1, 1, 1, 0), 2, 64, True, upcast_attention=True),
    # as SDXL's: no attention on the finest level, deeper transformers on the coarser ones, the context of both text
    # encoders (64 + 128) and the vector of the second one's pooled text and six sizes (128 + 6 x 256)
    "sdxl": UNetArchitecture(4, 4, (32, 64, 64), (1, 1, 1), (0, 1, 2), 2, 192, True, vector_width=1664),
}
TEXT_ENCODERS = {
    "sd1": TextArchitecture(49408, 77, 64, 128, layers=2, heads=1, activation="quick_gelu"),
    "sd2": TextArchitecture(49408, 77, 64, 128, layers=2, heads=1, activation="gelu"),
    "sdxl": TextArchitecture(49408, 77, 64, 128, layers=2, heads=1, activation="quick_gelu"),
}
SECOND_TEXT_ENCODER = TextArchitecture(49408, 77, 128, 128, layers=3, heads=2, activation="gelu", projection=128)
VAE = VaeArchitecture(3, 4, (32, 32, 32, 32), resnets=1)


def tiny_sd_checkpoint(
    path: Path, kind: str = "sd1", v_prediction: bool = False, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Path:
    """Write a single-file .safetensors checkpoint of a tiny model of `kind` ("sd1" | "sd2"); about 15 MB in float32.

    It holds what public files hold beside the model (noise schedule, position ids or OpenCLIP's unused parts), and the
    marker of v-prediction where asked.
    """
    state = {name: tensor.to(dtype) for name, tensor in single_file_state(tiny_state(kind, seed)).items()}
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    state["betas"] = betas.float()
    state["alphas_cumprod"] = (1 - betas).cumprod(0).float()
    if kind == "sd1":
        state["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    if v_prediction:
        state["v_pred"] = torch.empty(0)
    save_file(state, path)
    return path


def tiny_sdxl_checkpoint(
    path: Path,
    v_prediction: bool = False,
    zero_terminal_snr: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write a single-file .safetensors checkpoint of a tiny SDXL model; about 50 MB in float32.

    Sizes: U-Net channels 32, 64, 64 with 0, 1, 2 transformer blocks; text encoders of width 64 (2 layers) and 128
    (3 layers, projected to 128); context 192, vector 1664; pictures of 8 x 8 latents and up. It holds what public
    files hold beside the model, and the markers of v-prediction and of zero terminal SNR where asked.
    """
    model = replace(tiny_state("sdxl", seed), v_prediction=v_prediction, zero_terminal_snr=zero_terminal_snr)
    state = {name: tensor.to(dtype) for name, tensor in single_file_state(model).items()}
    state[f"{SDXL_OPENCLIP_PREFIX}logit_scale"] = torch.tensor(4.6052, dtype=dtype)
    state[f"{SDXL_CLIP_PREFIX}text_model.embeddings.position_ids"] = torch.arange(77)[None]
    state["denoiser.sigmas"] = torch.linspace(0.0292, 14.6146, 1000)
    save_file(state, path)
    return path


def tiny_state(kind: str, seed: int = 0) -> ModelState:
    """The random weights of a tiny model, by our parameter names."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        scale = SDXL_VAE_SCALE if kind == "sdxl" else VAE_SCALE
        # their order decides their weights, and so the golden losses
        modules = [build_unet(UNETS[kind]), build_text_encoder(TEXT_ENCODERS[kind]), build_vae(VAE, scale=scale)]
        if kind == "sdxl":
            modules.append(build_text_encoder(SECOND_TEXT_ENCODER))
        for module in modules:
            _randomise_constants(module)
    return ModelState(kind, *(module.state_dict() for module in modules))


@torch.no_grad()
def _randomise_constants(module: torch.nn.Module) -> None:
    """Biases and norms start as zeros and ones; random ones show when two of them are mixed up."""
    for name, parameter in module.named_parameters():
        if parameter.ndim == 1:
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
        elif "embedding" in name and "text_model" in name:
            parameter.normal_(std=0.3)  # CLIP's initial 0.02 would leave all captions alike
