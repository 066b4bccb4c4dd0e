"""The parts of an SD 1.x / 2.x model as modules: from a single file or a Diffusers folder, each weight copied once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

from library.checkpoints.architecture import (
    ArchitectureError,
    TextArchitecture,
    text_architecture,
    unet_architecture,
    vae_architecture,
    vae_prefix,
)
from library.checkpoints.keymaps import VAE_PREFIX, classic_text_key, modern_vae_key
from library.checkpoints.probe import VAE_FLAG, check_vae, read_config
from library.checkpoints.sd import part_reader
from library.checkpoints.weights import Weights, open_component, open_weights
from library.families.base import LoadPlan
from library.models.build import build_from_config, build_text_encoder, build_unet, build_vae, fill
from library.options import OptionError

Parts = tuple[torch.nn.Module, torch.nn.Module, torch.nn.Module]  # U-Net, text encoder, VAE


def load_from_file(path: Path, kind: str, vae: torch.nn.Module | None, plan: LoadPlan, flag: str) -> Parts:
    """The parts of a single file; `vae` replaces the file's own. Missing tensors are found before any is read."""
    with open_weights(path, flag) as weights:
        modules = _empty_parts(weights, path, kind, vae, flag)
        readers = _readers(modules, weights, path, kind, flag)
        dtypes = {"unet": plan.unet, "text_encoder": plan.text_encoders, "vae": plan.vae}
        for part, module in modules.items():
            fill(module, readers[part], dtype=dtypes[part], device=plan.device)
    return modules["unet"], modules["text_encoder"], vae or modules["vae"]


def _empty_parts(
    weights: Weights, path: Path, kind: str, vae: torch.nn.Module | None, flag: str
) -> dict[str, torch.nn.Module]:
    """The parts of a single file by name on the meta device: sizes without values. Not the VAE where `vae` is it."""
    modules: dict[str, torch.nn.Module] = {}
    try:
        with torch.device("meta"):
            modules["unet"] = build_unet(unet_architecture(weights.shapes, kind))
            modules["text_encoder"] = build_text_encoder(text_architecture(weights.shapes, kind))
            if vae is None:
                modules["vae"] = build_vae(vae_architecture(weights.shapes))
    except ArchitectureError as error:
        way_out = "name a VAE with --vae" if VAE_PREFIX in str(error) else "use a complete checkpoint"
        raise OptionError(flag, f"{path} is incomplete: {error}", way_out) from None
    return modules


def _readers(
    modules: dict[str, torch.nn.Module], weights: Weights, path: Path, kind: str, flag: str
) -> dict[str, Callable[[str], torch.Tensor]]:
    """A reader for each part; OptionError names tensors that are missing."""
    return {
        part: part_reader(part, module.state_dict(), weights, kind=kind, subject=f"{flag}: {path}")
        for part, module in modules.items()
    }


def empty_parts_of_file(path: Path, kind: str, vae: torch.nn.Module | None, flag: str) -> Parts:
    """The parts of a single file on the meta device, from its header alone; what it lacks is found all the same."""
    with open_weights(path, flag) as weights:
        modules = _empty_parts(weights, path, kind, vae, flag)
        _readers(modules, weights, path, kind, flag)
    return modules["unet"], modules["text_encoder"], vae or modules["vae"]


def empty_parts_of_folder(folder: Path, vae: torch.nn.Module | None, flag: str) -> Parts:
    """The parts of a Diffusers folder on the meta device, from their configurations."""
    unet_config, text_config = (read_config(folder / part / "config.json", flag) for part in ("unet", "text_encoder"))
    with torch.device("meta"):
        unet = build_from_config(UNet2DConditionModel, unet_config)
        text_encoder = build_text_encoder(_text_architecture(text_config))
        vae = vae or build_from_config(AutoencoderKL, read_config(folder / "vae" / "config.json", flag))
    return unet, text_encoder, vae


def empty_vae(path: str) -> torch.nn.Module:
    """An external VAE on the meta device; see :func:`load_vae`."""
    found = check_vae(path)
    with torch.device("meta"):
        if found.is_dir():
            return build_from_config(AutoencoderKL, read_config(found / "config.json", VAE_FLAG))
        with open_weights(found, VAE_FLAG) as weights:
            return build_vae(vae_architecture(weights.shapes, vae_prefix(weights.shapes)))


def load_from_folder(folder: Path, vae: torch.nn.Module | None, plan: LoadPlan, flag: str) -> Parts:
    """The parts of a Diffusers folder."""
    unet, text_encoder, empty_vae_part = empty_parts_of_folder(folder, vae, flag)
    _fill_from_folder(unet, folder / "unet", "diffusion_pytorch_model", plan.unet, plan.device, flag)
    _fill_from_folder(
        text_encoder, folder / "text_encoder", "model", plan.text_encoders, plan.device, flag, classic_text_key
    )
    return unet, text_encoder, vae or _filled_vae(empty_vae_part, folder / "vae", plan, flag)


def load_vae(path: str, plan: LoadPlan) -> torch.nn.Module:
    """An external VAE: a Diffusers folder (itself or its "vae"), a file in either layout, a checkpoint, a hub id."""
    found, vae = check_vae(path), empty_vae(path)
    if found.is_dir():
        return _filled_vae(vae, found, plan, VAE_FLAG)
    with open_weights(found, VAE_FLAG) as weights:
        if any(".down_blocks." in key for key in weights.shapes):
            reader = _named_reader(vae, weights, f"{VAE_FLAG}: {found}", modern_vae_key)
        else:
            reader = part_reader("vae", vae.state_dict(), weights, kind="", subject=f"{VAE_FLAG}: {found}")
        return fill(vae, reader, dtype=plan.vae, device=plan.device)


def _filled_vae(vae: torch.nn.Module, folder: Path, plan: LoadPlan, flag: str) -> torch.nn.Module:
    _fill_from_folder(vae, folder, "diffusion_pytorch_model", plan.vae, plan.device, flag, modern_vae_key)
    return vae


def _fill_from_folder(
    module: torch.nn.Module,
    folder: Path,
    stem: str,
    dtype: torch.dtype,
    device: torch.device,
    flag: str,
    rename: Callable[[str], str] = str,
) -> None:
    with open_component(folder, stem, flag) as weights:
        fill(module, _named_reader(module, weights, f"{flag}: {folder}", rename), dtype=dtype, device=device)


def _named_reader(
    module: torch.nn.Module, weights: Weights, subject: str, rename: Callable[[str], str]
) -> Callable[[str], torch.Tensor]:
    """A reader of weights that are named like the module's parameters once `rename` has modernised them."""
    file_names = {rename(key): key for key in weights.shapes}
    missing = sorted(set(module.state_dict()) - set(file_names))
    if missing:
        raise OptionError("", f"{subject} lacks {len(missing)} tensors ({missing[0]} ...)", "use a complete model")
    return lambda name: weights.tensor(file_names[name])


def _text_architecture(config: dict[str, Any]) -> TextArchitecture:
    """From a CLIP text encoder's config.json; absent entries have the defaults of CLIP ViT-L."""
    return TextArchitecture(
        vocabulary=config.get("vocab_size", 49408),
        positions=config.get("max_position_embeddings", 77),
        width=config.get("hidden_size", 768),
        mlp_width=config.get("intermediate_size", 3072),
        layers=config.get("num_hidden_layers", 12),
        heads=config.get("num_attention_heads", 12),
        activation=config.get("hidden_act", "quick_gelu"),
    )
