"""What a model is, before anything heavy is imported or read: kind, format, prediction type, and every refusal."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from library.checkpoints.architecture import (
    SIZE_NUMBERS,
    SIZE_WIDTH,
    ArchitectureError,
    is_refiner,
    model_kind,
    text_architectures,
    unet_architecture,
    vae_architecture,
    vae_prefix,
)
from library.checkpoints.keymaps import V_PREDICTION_MARKER, ZERO_TERMINAL_SNR_MARKER
from library.checkpoints.network_kind import KIND_NAMES
from library.checkpoints.scaled import check_not_scaled
from library.checkpoints.source import ModelSource
from library.checkpoints.weights import open_weights, read_config
from library.options import OptionError

VAE_FLAG = "--vae"
MODEL_FLAG = "--pretrained_model_name_or_path"
SD_SCRIPT = "train_network.py"
SDXL_SCRIPT = "sdxl_train_network.py"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
LORA_KEYS = re.compile(r"^lora_(unet|te\d?)_|\.lora_(up|down|A|B)\.|\.(hada|lokr)_w")
PLAIN_MODEL = "use the plain model it was made from"
EDM_KEYS = ("edm_mean", "edm_vpred.sigma_max")  # Playground 2.5, CosXL


def probe(
    path: str,
    *,
    flag: str = MODEL_FLAG,
    family: str = "sd",
    sd_script: str = SD_SCRIPT,
    sdxl_script: str = SDXL_SCRIPT,
    v2: bool = False,
    may_inpaint: bool = False,
) -> ModelSource:
    """The source of a single file, a Diffusers folder or a hub id; headers only, no weights.

    Raises OptionError naming `flag` for what is no model of `family` ("sd": SD 1.x / 2.x, "sdxl"); for one of the other
    family it names that one's script, for a contradiction with --v2 that flag. Inpainting models, whose U-Nets have
    nine input channels, are taken only by who says that it `may_inpaint`. Only a hub id may use the network (see
    resolve_model).
    """
    found = resolve_model(path, flag)
    source = (_probe_folder if found.is_dir() else _probe_file)(path, found, family, flag)
    if _family(source.kind) != family:
        script = sdxl_script if source.kind == "sdxl" else sd_script
        raise OptionError(flag, f"{path} is an {KIND_NAMES[source.kind]} model", f"use {script}")
    if not (may_inpaint and source.in_channels == 9):
        _require_four_channels(path, source.in_channels, flag)
    if v2 and source.kind != "sd2":
        raise OptionError("--v2", f"the model {path} is {KIND_NAMES[source.kind]}", "remove the flag")
    return source


def probe_any(path: str, *, flag: str = MODEL_FLAG, v2: bool = False, may_inpaint: bool = False) -> ModelSource:
    """As :func:`probe`, of a model of either family."""
    found = resolve_model(path, flag)
    kind = (_probe_folder if found.is_dir() else _probe_file)(path, found, "", flag).kind
    return probe(path, flag=flag, family=_family(kind), v2=v2, may_inpaint=may_inpaint)


def _family(kind: str) -> str:
    return "sdxl" if kind == "sdxl" else "sd"


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


def _probe_file(path: str, found: Path, family: str, flag: str) -> ModelSource:
    with open_weights(found, flag) as weights:
        shapes, metadata = weights.shapes, weights.metadata
        if any(LORA_KEYS.search(key) for key in shapes):
            way_out = "give it as --network_weights" if flag in (MODEL_FLAG, "--ckpt") else "name a whole model"
            raise OptionError(flag, f"{path} is a LoRA, not a base model", way_out)
        check_not_scaled(shapes, path, flag)
        kind = model_kind(shapes)
        if not kind:
            raise OptionError(
                flag, f"{path} is no Stable Diffusion model: it holds no U-Net", "name a complete checkpoint"
            )
        in_channels = _check_parts(path, shapes, kind, flag) if _family(kind) == family else 4
        return ModelSource(
            path,
            kind,
            is_single_file=True,
            v_prediction=says_v_prediction(shapes, metadata),
            zero_terminal_snr=ZERO_TERMINAL_SNR_MARKER in shapes,
            in_channels=in_channels,
        )


def _check_parts(path: str, shapes: Mapping[str, tuple[int, ...]], kind: str, flag: str) -> int:
    """The U-Net's input channels; raises OptionError for a model that is not complete or of a special kind."""
    if is_refiner(shapes):
        raise _is_refiner(path, flag)
    if any(key in shapes for key in EDM_KEYS):
        raise _has_edm_schedule(path, flag)
    try:
        unet = unet_architecture(shapes, kind)
        encoders = text_architectures(shapes, kind)
        if kind == "sdxl" and unet.pooled_width != encoders[-1].projection:
            own = f"{encoders[-1].projection} + {SIZE_NUMBERS} x {SIZE_WIDTH}"
            raise ArchitectureError(f"its U-Net takes a vector of {unet.vector_width} numbers, not {own}")
    except ArchitectureError as error:
        raise OptionError(flag, f"{path} is no complete {KIND_NAMES[kind]} model: {error}") from None
    if kind != "sdxl" and unet.vector_width:
        raise OptionError(flag, f"{path} is an unCLIP model, which also takes a picture", PLAIN_MODEL)
    return unet.in_channels


def says_v_prediction(shapes: Mapping[str, Any], metadata: Mapping[str, str]) -> bool:
    """Whether a file says, by a marker or in its metadata, that its model predicts velocity."""
    stated = metadata.get("modelspec.prediction_type", "")
    named = metadata.get("modelspec.architecture", "").endswith("-768-v")
    return V_PREDICTION_MARKER in shapes or stated in ("v", "v_prediction") or (named and not stated)


# ------------------------------------------------------------------------------------ Diffusers folder


def _probe_folder(path: str, folder: Path, family: str, flag: str) -> ModelSource:
    if not (folder / "unet" / "config.json").is_file():
        problem = f"the folder {path} is no Diffusers model: it has no unet/config.json"
        raise OptionError(flag, problem, "name the model's file or its Diffusers folder")
    unet = read_config(folder / "unet" / "config.json", flag)
    is_sdxl = (folder / "text_encoder_2").is_dir()
    if is_sdxl and family != "sdxl":
        return ModelSource(path, "sdxl", is_single_file=False, v_prediction=False)
    if is_sdxl and unet.get("cross_attention_dim") == 1280:
        raise _is_refiner(path, flag)
    text = read_config(folder / "text_encoder" / "config.json", flag)
    scheduler_path = folder / "scheduler" / "scheduler_config.json"
    scheduler = read_config(scheduler_path, flag) if scheduler_path.is_file() else {}
    if scheduler.get("_class_name", "").startswith("EDM"):
        raise _has_edm_schedule(path, flag)
    kind = "sd2" if text.get("hidden_act") == "gelu" or unet.get("cross_attention_dim") == 1024 else "sd1"
    if is_sdxl:
        read_config(folder / "text_encoder_2" / "config.json", flag)
        kind = "sdxl"
    return ModelSource(
        path,
        kind,
        is_single_file=False,
        v_prediction=scheduler.get("prediction_type") == "v_prediction",
        zero_terminal_snr=bool(scheduler.get("rescale_betas_zero_snr")),
        in_channels=unet.get("in_channels", 4),
    )


def _is_refiner(path: str, flag: str) -> OptionError:
    return OptionError(flag, f"{path} is the SDXL refiner, which can't be trained here", "use an SDXL base model")


def _has_edm_schedule(path: str, flag: str) -> OptionError:
    problem = f"{path} was trained with an EDM noise schedule (as Playground 2.5 and CosXL), which is not supported"
    return OptionError(flag, problem, "use an SDXL base model")


def _require_four_channels(path: str, in_channels: int, flag: str) -> None:
    if in_channels != 4:
        kind = "an inpainting" if in_channels == 9 else "another kind of"
        problem = f"{path} is {kind} model: its U-Net takes {in_channels} channels, not 4"
        raise OptionError(flag, problem, PLAIN_MODEL)
