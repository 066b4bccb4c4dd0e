"""What a model is, before anything heavy is imported or read: kind, format, prediction type, and every refusal."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from library.checkpoints.architecture import (
    ArchitectureError,
    model_kind,
    text_architecture,
    unet_architecture,
    vae_architecture,
    vae_prefix,
)
from library.checkpoints.source import ModelSource
from library.checkpoints.weights import open_weights
from library.options import OptionError

VAE_FLAG = "--vae"
MODEL_FLAG = "--pretrained_model_name_or_path"
SDXL_SCRIPT = "sdxl_train_network.py"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
LORA_KEYS = re.compile(r"^lora_(unet|te\d?)_|\.lora_(up|down|A|B)\.|\.(hada|lokr)_w")
KIND_NAMES = {"sd1": "SD 1.x", "sd2": "SD 2.x", "sdxl": "SDXL"}


def probe(path: str, *, flag: str = MODEL_FLAG, sdxl_script: str = SDXL_SCRIPT, v2: bool = False) -> ModelSource:
    """The source of a single file, a Diffusers folder or a hub id; headers only, no weights.

    Raises OptionError naming `flag` for what is no SD 1.x / 2.x model; for SDXL it names `sdxl_script`, for a
    contradiction with --v2 that flag. Only a hub id may use the network (see resolve_model).
    """
    found = resolve_model(path, flag)
    source = _probe_folder(path, found, flag) if found.is_dir() else _probe_file(path, found, flag)
    if source.kind == "sdxl":
        raise OptionError(flag, f"{path} is an SDXL model", f"use {sdxl_script}")
    if v2 and source.kind != "sd2":
        raise OptionError("--v2", f"the model {path} is {KIND_NAMES[source.kind]}", "remove the flag")
    return source


def resolve_model(path: str, flag: str = MODEL_FLAG) -> Path:
    """The file or folder of a path or hub id; a hub id is fetched unless its files are in the local hub cache."""
    found = Path(path).expanduser()
    if found.exists():
        return found.resolve()
    if _may_be_hub_id(path):
        from library.checkpoints.hub import fetch_model

        return fetch_model(path, flag)
    raise OptionError(flag, f"{path} does not exist", "check the path")


def check_vae(path: str, flag: str = VAE_FLAG) -> Path:
    """The file or folder of an external VAE; raises OptionError naming `flag` for what is none. Headers only."""
    found = Path(path).expanduser()
    if not found.exists():
        if not _may_be_hub_id(path):
            raise OptionError(flag, f"{path} does not exist", "check the path")
        from library.checkpoints.hub import fetch_vae

        found = fetch_vae(path, flag)
    if found.is_dir():
        folder = found if (found / "config.json").is_file() else found / "vae"
        read_config(folder / "config.json", flag)
        return folder
    with open_weights(found, flag) as weights:
        try:
            vae_architecture(weights.shapes, vae_prefix(weights.shapes))
        except ArchitectureError as error:
            raise OptionError(flag, f"{path} is no VAE of Stable Diffusion: {error}") from None
    return found


def _may_be_hub_id(path: str) -> bool:
    is_file_name = Path(path).suffix.lower() in (".safetensors", ".ckpt", ".pt", ".bin")
    return HUB_ID.fullmatch(path) is not None and not is_file_name


# -------------------------------------------------------------------------------------------- one file


def _probe_file(path: str, found: Path, flag: str) -> ModelSource:
    with open_weights(found, flag) as weights:
        shapes, metadata = weights.shapes, weights.metadata
        if any(LORA_KEYS.search(key) for key in shapes):
            raise OptionError(flag, f"{path} is a LoRA, not a base model", "give it as --network_weights")
        kind = model_kind(shapes)
        if not kind:
            raise OptionError(
                flag, f"{path} is no Stable Diffusion model: it holds no U-Net", "name a complete checkpoint"
            )
        if kind != "sdxl":
            _check_parts(path, shapes, kind, flag)
        return ModelSource(path, kind, is_single_file=True, v_prediction=_says_v_prediction(shapes, metadata))


def _check_parts(path: str, shapes: Mapping[str, tuple[int, ...]], kind: str, flag: str) -> None:
    try:
        unet = unet_architecture(shapes, kind)
        text_architecture(shapes, kind)
    except ArchitectureError as error:
        raise OptionError(flag, f"{path} is no complete {KIND_NAMES[kind]} model: {error}") from None
    _require_four_channels(path, unet.in_channels, flag)


def _says_v_prediction(shapes: Mapping[str, Any], metadata: Mapping[str, str]) -> bool:
    stated = metadata.get("modelspec.prediction_type", "")
    named = metadata.get("modelspec.architecture", "").endswith("-768-v")
    return "v_pred" in shapes or stated in ("v", "v_prediction") or (named and not stated)


# ------------------------------------------------------------------------------------ Diffusers folder


def _probe_folder(path: str, folder: Path, flag: str) -> ModelSource:
    if (folder / "text_encoder_2").is_dir():
        return ModelSource(path, "sdxl", is_single_file=False, v_prediction=False)
    if not (folder / "unet" / "config.json").is_file():
        problem = f"the folder {path} is no Diffusers model: it has no unet/config.json"
        raise OptionError(flag, problem, "name the model's file or its Diffusers folder")
    unet = read_config(folder / "unet" / "config.json", flag)
    text = read_config(folder / "text_encoder" / "config.json", flag)
    scheduler = folder / "scheduler" / "scheduler_config.json"
    prediction = read_config(scheduler, flag).get("prediction_type") if scheduler.is_file() else None
    kind = "sd2" if text.get("hidden_act") == "gelu" or unet.get("cross_attention_dim") == 1024 else "sd1"
    _require_four_channels(path, unet.get("in_channels", 4), flag)
    return ModelSource(path, kind, is_single_file=False, v_prediction=prediction == "v_prediction")


def read_config(path: Path, flag: str) -> dict[str, Any]:
    """A component's JSON configuration."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise OptionError(flag, f"{path} is missing", "check that the Diffusers folder is complete") from None
    except ValueError as error:
        raise OptionError(flag, f"{path} is no valid JSON ({error})", "copy or download it again") from None


def _require_four_channels(path: str, in_channels: int, flag: str) -> None:
    if in_channels != 4:
        kind = "an inpainting" if in_channels == 9 else "another kind of"
        problem = f"{path} is {kind} model: its U-Net takes {in_channels} channels, not 4"
        raise OptionError(flag, problem, "use the plain model it was made from")
