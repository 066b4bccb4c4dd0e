"""The parts of a Stable Diffusion model as modules, from a single file or a Diffusers folder; weights copied once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

from library.checkpoints.architecture import (
    ArchitectureError,
    TextArchitecture,
    text_architectures,
    unet_architecture,
    vae_architecture,
    vae_prefix,
)
from library.checkpoints.keymaps import VAE_PREFIX, classic_text_key, modern_vae_key
from library.checkpoints.probe import MODEL_FLAG, VAE_FLAG, check_vae, read_config
from library.checkpoints.sd import part_reader
from library.checkpoints.weights import Weights, open_component, open_weights
from library.families.base import LoadPlan
from library.models.build import (
    SDXL_VAE_SCALE,
    VAE_SCALE,
    build_from_config,
    build_text_encoder,
    build_unet,
    build_vae,
    fill,
)
from library.options import OptionError

TEXT_PARTS = ("text_encoder", "text_encoder_2")  # what files and folders call the text encoders; SDXL has both


class Parts(NamedTuple):
    """A model's modules."""

    unet: torch.nn.Module
    text_encoders: tuple[torch.nn.Module, ...]
    vae: torch.nn.Module

    @classmethod
    def of(cls, modules: dict[str, torch.nn.Module], vae: torch.nn.Module | None) -> Parts:
        """From modules by name; `vae` replaces theirs."""
        text_encoders = tuple(modules[name] for name in TEXT_PARTS if name in modules)
        return cls(modules["unet"], text_encoders, vae or modules["vae"])


def load_parts(found: Path, kind: str, vae: str | None, plan: LoadPlan) -> Parts:
    """The parts of a model's file or folder on their device; `vae` names another VAE."""
    own = (load_vae(vae, plan) if "vae" in plan.parts else empty_vae(vae)) if vae else None
    if found.is_dir():
        return load_from_folder(found, own, plan, MODEL_FLAG)
    return load_from_file(found, kind, own, plan, MODEL_FLAG)


def empty_parts(found: Path, kind: str, vae: str | None, plan: LoadPlan) -> Parts:
    """The same on the meta device, frozen and in eval mode: names, sizes and precisions without weights."""
    own = empty_vae(vae) if vae else None
    if found.is_dir():
        parts = empty_parts_of_folder(found, own, MODEL_FLAG)
    else:
        parts = empty_parts_of_file(found, kind, own, MODEL_FLAG)
    dtypes = [(parts.unet, plan.unet), (parts.vae, plan.vae)]
    dtypes += [(encoder, plan.text_encoders) for encoder in parts.text_encoders]
    for part, dtype in dtypes:
        torch.nn.Module.to(part, dtype).requires_grad_(False).eval()
    return parts


def load_from_file(path: Path, kind: str, vae: torch.nn.Module | None, plan: LoadPlan, flag: str) -> Parts:
    """The parts of a single file; `vae` replaces the file's own. Missing tensors are found before any is read."""
    with open_weights(path, flag) as weights:
        modules = _empty_parts(weights, path, kind, vae, flag)
        readers = _readers(modules, weights, path, kind, flag)
        dtypes = {"unet": plan.unet, "vae": plan.vae}
        for part, module in modules.items():
            if _group(part) not in plan.parts:
                continue
            fill(module, readers[part], dtype=dtypes.get(part, plan.text_encoders), device=plan.device)
    return Parts.of(modules, vae)


def _group(part: str) -> str:
    """What a load plan calls a part."""
    return "text_encoders" if part in TEXT_PARTS else part


def _empty_parts(
    weights: Weights, path: Path, kind: str, vae: torch.nn.Module | None, flag: str
) -> dict[str, torch.nn.Module]:
    """The parts of a single file by name on the meta device: sizes without values. Not the VAE where `vae` is it."""
    modules: dict[str, torch.nn.Module] = {}
    is_sdxl = kind == "sdxl"
    try:
        with torch.device("meta"):
            modules["unet"] = build_unet(unet_architecture(weights.shapes, kind), sample_size=128 if is_sdxl else 64)
            for name, architecture in zip(TEXT_PARTS, text_architectures(weights.shapes, kind), strict=False):
                modules[name] = build_text_encoder(architecture)
            if vae is None:
                size, scale = (1024, SDXL_VAE_SCALE) if is_sdxl else (512, VAE_SCALE)
                modules["vae"] = build_vae(vae_architecture(weights.shapes), sample_size=size, scale=scale)
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
    return Parts.of(modules, vae)


def empty_parts_of_folder(folder: Path, vae: torch.nn.Module | None, flag: str) -> Parts:
    """The parts of a Diffusers folder on the meta device, from their configurations."""
    modules: dict[str, torch.nn.Module] = {}
    with torch.device("meta"):
        modules["unet"] = build_from_config(UNet2DConditionModel, read_config(folder / "unet" / "config.json", flag))
        for name in (name for name in TEXT_PARTS if (folder / name).is_dir() or name == TEXT_PARTS[0]):
            config = read_config(folder / name / "config.json", flag)
            modules[name] = build_text_encoder(_text_architecture(config, is_projected=name == "text_encoder_2"))
        if vae is None:
            modules["vae"] = build_from_config(AutoencoderKL, read_config(folder / "vae" / "config.json", flag))
    return Parts.of(modules, vae)


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
    empty = empty_parts_of_folder(folder, vae, flag)
    if "unet" in plan.parts:
        _fill_from_folder(empty.unet, folder / "unet", "diffusion_pytorch_model", plan.unet, plan.device, flag)
    for name, encoder in zip(TEXT_PARTS, empty.text_encoders, strict=False) if "text_encoders" in plan.parts else ():
        _fill_from_folder(encoder, folder / name, "model", plan.text_encoders, plan.device, flag, classic_text_key)
    if vae is not None or "vae" not in plan.parts:
        return empty
    return empty._replace(vae=_filled_vae(empty.vae, folder / "vae", plan, flag))


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


def _text_architecture(config: dict[str, Any], *, is_projected: bool) -> TextArchitecture:
    """From a CLIP text encoder's config.json; absent entries have the defaults of CLIP ViT-L."""
    return TextArchitecture(
        vocabulary=config.get("vocab_size", 49408),
        positions=config.get("max_position_embeddings", 77),
        width=config.get("hidden_size", 768),
        mlp_width=config.get("intermediate_size", 3072),
        layers=config.get("num_hidden_layers", 12),
        heads=config.get("num_attention_heads", 12),
        activation=config.get("hidden_act", "quick_gelu"),
        projection=config.get("projection_dim", 512) if is_projected else None,
    )
