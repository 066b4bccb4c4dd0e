"""Full-size Stable Diffusion single files with random weights, written one by one: 2.1 GB (SD 1.5), 2.6 GB (2.1),
6.9 GB (XL) in half precision."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import torch

from library.checkpoints.architecture import TextArchitecture, UNetArchitecture, VaeArchitecture
from library.checkpoints.keymaps import SDXL_CLIP_PREFIX, SDXL_OPENCLIP_PREFIX
from library.checkpoints.safetensors_io import Entry, header_dtype, write_entries
from library.checkpoints.sd import ModelState, model_entries
from library.models.build import SDXL_VAE_SCALE, VAE_SCALE, build_text_encoder, build_unet, build_vae

CHANNELS = (320, 640, 1280, 1280)
DEPTHS = (1, 1, 1, 0)
UNETS = {
    "sd1": UNetArchitecture(4, 4, CHANNELS, (8, 8, 8, 8), DEPTHS, 2, 768, linear_projection=False),
    "sd2": UNetArchitecture(4, 4, CHANNELS, (5, 10, 20, 20), DEPTHS, 2, 1024, True, upcast_attention=True),
    "sdxl": UNetArchitecture(4, 4, (320, 640, 1280), (5, 10, 20), (0, 2, 10), 2, 2048, True, vector_width=2816),
}
TEXT_ENCODERS = {
    "sd1": TextArchitecture(49408, 77, 768, 3072, layers=12, heads=12, activation="quick_gelu"),
    "sd2": TextArchitecture(49408, 77, 1024, 4096, layers=23, heads=16, activation="gelu"),
    "sdxl": TextArchitecture(49408, 77, 768, 3072, layers=12, heads=12, activation="quick_gelu"),
}
SECOND_TEXT_ENCODER = TextArchitecture(49408, 77, 1280, 5120, layers=32, heads=20, activation="gelu", projection=1280)
VAE = VaeArchitecture(3, 4, (128, 256, 512, 512), resnets=2)
BLOCK = 1 << 22


def meta_state(kind: str) -> ModelState:
    """The parameter names and shapes of a full-size model of `kind` ("sd1" | "sd2" | "sdxl"), without memory."""
    return ModelState(kind, **{part: module.state_dict() for part, module in meta_modules(kind).items()})


def meta_modules(kind: str) -> dict[str, torch.nn.Module]:
    """The parts of a full-size model on the meta device."""
    is_sdxl = kind == "sdxl"
    with torch.device("meta"):
        modules = {
            "unet": build_unet(UNETS[kind], sample_size=128 if is_sdxl else 64),
            "text_encoder": build_text_encoder(TEXT_ENCODERS[kind]),
            "vae": build_vae(
                VAE, **({"sample_size": 1024, "scale": SDXL_VAE_SCALE} if is_sdxl else {"scale": VAE_SCALE})
            ),
        }
        if is_sdxl:
            modules["text_encoder_2"] = build_text_encoder(SECOND_TEXT_ENCODER)
    return modules


def require_room(folder: Path, *, disk: float, memory: float) -> None:
    """Skip a test where the disk or the memory of the machine has not so many bytes free."""
    if shutil.disk_usage(folder).free < disk:
        pytest.skip(f"needs {disk / 1e9:.0f} GB of disk")
    status = Path("/proc/meminfo")
    lines = status.read_text().splitlines() if status.exists() else []
    free = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
    if free and free[0] < memory:
        pytest.skip(f"needs {memory / 1e9:.0f} GB of memory")


def write_full_size(path: Path, kind: str, dtype: torch.dtype = torch.float16) -> Path:
    """A single file with the tensors public files of `kind` hold; no tensor equals another."""
    pool = torch.randn(2 * BLOCK, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(dtype)
    shapes = {entry.name: entry.shape for entry in model_entries(meta_state(kind), dtype)}
    if kind == "sdxl":
        shapes |= {"denoiser.sigmas": (1000,), f"{SDXL_OPENCLIP_PREFIX}logit_scale": ()}
    else:
        schedule = ["betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "posterior_variance"]
        shapes |= {name: (1000,) for name in schedule}
    if kind == "sd1":
        shapes["model_ema.decay"] = ()
    entries = [_random_entry(name, shape, pool, i) for i, (name, shape) in enumerate(shapes.items())]
    if kind == "sd2":
        entries += _openclip_extras(len(entries), pool)
    else:
        prefix = SDXL_CLIP_PREFIX if kind == "sdxl" else "cond_stage_model.transformer."
        name = f"{prefix}text_model.embeddings.position_ids"
        entries.append(Entry(name, "I64", (1, 77), lambda: torch.arange(77)[None]))
    write_entries(entries, path, {"format": "pt"})
    return path


def _openclip_extras(start: int, pool: torch.Tensor) -> list[Entry]:
    prefix = "cond_stage_model.model."
    block = f"{prefix}transformer.resblocks.23."
    shapes = {
        f"{prefix}logit_scale": (),
        f"{prefix}text_projection": (1024, 1024),
        f"{block}attn.in_proj_weight": (3072, 1024),
        f"{block}attn.in_proj_bias": (3072,),
        f"{block}attn.out_proj.weight": (1024, 1024),
        f"{block}attn.out_proj.bias": (1024,),
        f"{block}mlp.c_fc.weight": (4096, 1024),
        f"{block}mlp.c_fc.bias": (4096,),
        f"{block}mlp.c_proj.weight": (1024, 4096),
        f"{block}mlp.c_proj.bias": (1024,),
        **{f"{block}{norm}.{leaf}": (1024,) for norm in ("ln_1", "ln_2") for leaf in ("weight", "bias")},
    }
    return [_random_entry(name, shape, pool, start + i) for i, (name, shape) in enumerate(shapes.items())]


def _random_entry(name: str, shape: tuple[int, ...], pool: torch.Tensor, index: int) -> Entry:
    """Numbers from the pool (deviation 0.02), from another place for each tensor."""

    def produce() -> torch.Tensor:
        start, count = 1009 * index % BLOCK, math.prod(shape)
        block = pool[start : start + BLOCK]
        numbers = (block.repeat(-(-count // BLOCK)) if count > BLOCK else block)[:count].reshape(shape)
        if len(shape) == 1 and name.endswith("weight"):
            return 1 + numbers  # a norm
        if len(shape) > 1:  # keeps the size of activations through the layers, so that pictures are alive
            return numbers * (50 / math.prod(shape[1:]) ** 0.5)
        return numbers

    return Entry(name, header_dtype(pool.dtype), shape, produce)
