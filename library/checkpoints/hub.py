"""Models of the Hugging Face hub: the only place that may use the network, and only for an id the user gave."""

from __future__ import annotations

from pathlib import Path

from library.options import OptionError

CONFIGS = ["model_index.json", "*.json", "*/*.json", "*/*.txt"]
HALF = "*.fp16.*"
WEIGHTS = ("*.safetensors", "*.fp16.safetensors", "*.bin")  # the best that a model has is fetched
NOT_NEEDED = ["*.non_ema.*", "safety_checker/*", "feature_extractor/*", "*.msgpack", "*.onnx*", "openvino*"]
PARTS = ("unet", "text_encoder", "text_encoder_2", "vae")


def fetch_model(repo_id: str, flag: str) -> Path:
    """The local folder of a hub model in Diffusers format, fetched unless the hub cache has it."""
    for name in WEIGHTS:
        ignored = NOT_NEEDED if "fp16" in name else [*NOT_NEEDED, HALF]
        folder = _snapshot(repo_id, flag, [*CONFIGS, *(f"{part}/{name}" for part in PARTS)], ignored)
        if not (folder / "unet").is_dir() or any((folder / "unet").glob(name)):
            break
    return folder


def fetch_vae(repo_id: str, flag: str) -> Path:
    """The local folder of a hub VAE: a repository that is one, or a whole model's, of which only the VAE is fetched."""
    names = ["config.json", "vae/config.json", "diffusion_pytorch_model.*", "vae/diffusion_pytorch_model.*"]
    return _snapshot(repo_id, flag, names, [*NOT_NEEDED, HALF])


def fetch_clip(repo_id: str, flag: str) -> Path:
    """The local folder of a hub model of the CLIP kind, of which the configuration and the best weights are fetched."""
    for name in ("model*.safetensors*", "pytorch_model*.bin*"):  # in one file, or in several with their index
        folder = _snapshot(repo_id, flag, ["config.json", name], [*NOT_NEEDED, HALF])
        if any(folder.glob(name)):
            break
    return folder


def _snapshot(repo_id: str, flag: str, patterns: list[str], ignored: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return Path(snapshot_download(repo_id, allow_patterns=patterns, ignore_patterns=ignored))
    except RepositoryNotFoundError:
        problem = f"{repo_id} is neither a file or folder here nor a public model of the hub"
        raise OptionError(flag, problem, "check the path; for a private model log in with `hf auth login`") from None
    except HFValidationError:
        raise OptionError(flag, f"{repo_id} does not exist and is no hub id", "check the path") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = type(error).__name__
        problem = f"{repo_id} is no file or folder here, and the hub can't be reached ({reason})"
        raise OptionError(flag, problem, "check the path, or the network") from None
