"""Writing Diffusers folders that today's and older versions of diffusers and transformers read.

Text encoder keys keep the classic `text_model.` level. What a single-file source holds beside the model (noise
schedule, OpenCLIP's unused parts) goes into one more file, which diffusers ignores, so that a way back loses nothing;
an EMA copy of the whole U-Net does not.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.checkpoints.own_folders import (
    CONTROL_NET_FOLDER,
    EXTRAS,
    MODEL_FOLDER,
    TOKENIZER_FILES,
    FolderForm,
)
from library.checkpoints.safetensors_io import (
    Entry,
    flush_to_disk,
    header_dtype,
    require_disk_space,
    rounded,
    write_entries,
)
from library.checkpoints.sd import ModelState, copied_entry, owned_keys
from library.checkpoints.torch_file import write_torch_file
from library.checkpoints.weights import Weights, read_config
from library.options import OptionError

if TYPE_CHECKING:
    import torch

EMA_PREFIX = "model_ema.diffusion_model"
PARTS = (  # folder, class, library, weights file
    ("unet", "UNet2DConditionModel", "diffusers", "diffusion_pytorch_model.safetensors"),
    ("text_encoder", "CLIPTextModel", "transformers", "model.safetensors"),
    ("text_encoder_2", "CLIPTextModelWithProjection", "transformers", "model.safetensors"),  # SDXL
    ("vae", "AutoencoderKL", "diffusers", "diffusion_pytorch_model.safetensors"),
)
BIN_FILES = {  # the older form of the weights files
    "diffusion_pytorch_model.safetensors": "diffusion_pytorch_model.bin",
    "model.safetensors": "pytorch_model.bin",
}
BEGIN, END = "<|startoftext|>", "<|endoftext|>"
VOCABULARY = Path(__file__).resolve().parent.parent / "text" / "clip_vocab"
"""The noise schedule Stable Diffusion was trained with."""
SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "steps_offset": 1,
}
SAMPLERS = {  # what the public models of a kind name
    "sd1": {"_class_name": "DDIMScheduler", "clip_sample": False, "set_alpha_to_one": False},
    "sd2": {"_class_name": "DDIMScheduler", "clip_sample": False, "set_alpha_to_one": False},
    "sdxl": {"_class_name": "EulerDiscreteScheduler", "interpolation_type": "linear", "timestep_spacing": "leading"},
}
"""What a schedule with zero terminal SNR needs of a sampler (Lin et al. 2023): to begin at the last timestep."""
ZERO_TERMINAL_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


def save_diffusers_folder(
    model: ModelState,
    configs: Mapping[str, Any],
    path: Path,
    *,
    source: Weights | None,
    dtype: torch.dtype | None,
    template: Path | None,
    safe_serialization: bool = True,
) -> None:
    """Write a complete folder beside `path` and put it in place of `path` at the end, when it is on the disk.

    Where something foreign lies in `path` by then, it stays and the folder gets another name beside it.

    `configs` are the configurations of the modules by part (see PARTS); `template` is the Diffusers folder the model
    came from, whose scheduler and tokenizers are kept. `dtype` None keeps each tensor's own. Without
    `safe_serialization` the weights are in PyTorch's .bin files, as diffusers calls it and old programs read them.
    """
    parts = _parts(model)
    entries = {folder: _entries(getattr(model, folder), dtype) for folder, *_ in parts}
    extras = _extra_entries(model, source)
    size = sum(entry.nbytes for part in (*entries.values(), extras) for entry in part)
    with _written_beside(path, size, MODEL_FOLDER) as partial:
        for folder, class_name, _, file_name in parts:
            _write_weights(entries[folder], partial / folder / file_name, safe_serialization=safe_serialization)
            _write_json(partial / folder / "config.json", _config(configs[folder], class_name, entries[folder]))
        if extras:
            write_entries(extras, partial / EXTRAS, {"format": "pt"})
        scheduler = _write_scheduler(partial / "scheduler", template, model)
        _write_tokenizer(partial / "tokenizer", template, "!" if model.kind == "sd2" else END)
        if model.kind == "sdxl":
            _write_tokenizer(partial / "tokenizer_2", template, "!")
        _write_json(partial / "model_index.json", _model_index(model, scheduler))


def save_control_net_folder(
    state: Mapping[str, torch.Tensor],
    config: Mapping[str, Any],
    path: Path,
    *,
    dtype: torch.dtype | None,
    safe_serialization: bool = True,
) -> None:
    """A ControlNet as diffusers' ControlNetModel reads it; otherwise as :func:`save_diffusers_folder`."""
    entries = _entries(state, dtype)
    _, _, _, file_name = PARTS[0]
    with _written_beside(path, sum(entry.nbytes for entry in entries), CONTROL_NET_FOLDER) as partial:
        _write_weights(entries, partial / file_name, safe_serialization=safe_serialization)
        _write_json(partial / "config.json", _config(config, "ControlNetModel", entries))


@contextlib.contextmanager
def _written_beside(path: Path, size: int, form: FolderForm) -> Iterator[Path]:
    """A folder to be filled with `size` bytes that is in place of `path` at the end, or leaves no trace."""
    if path.is_file():
        raise OptionError("", f"{path} is a file", "choose another output name for the Diffusers folder")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        require_disk_space(path.parent, size)
        partial = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"))
    except OSError as error:
        raise OptionError("", f"{path} can't be written: {error.strerror}", "choose another output folder") from None
    try:
        yield partial
        for written in [*partial.rglob("*"), partial]:  # what is there already takes no time
            flush_to_disk(written)
        _replace_folder(partial, path, form)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _write_weights(entries: list[Entry], path: Path, *, safe_serialization: bool) -> None:
    if safe_serialization:
        write_entries(entries, path, {"format": "pt"})
    else:
        write_torch_file(entries, path.with_name(BIN_FILES[path.name]))


def _parts(model: ModelState) -> list[tuple[str, str, str, str]]:
    return [part for part in PARTS if getattr(model, part[0])]


def _entries(state: Mapping[str, torch.Tensor], dtype: torch.dtype | None) -> list[Entry]:
    return [_entry(name, tensor, dtype or tensor.dtype) for name, tensor in state.items()]


def _entry(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> Entry:
    return Entry(
        name, header_dtype(dtype), tuple(tensor.shape), lambda: rounded(tensor.detach().to("cpu"), dtype, name)
    )


def _extra_entries(model: ModelState, source: Weights | None) -> list[Entry]:
    if source is None:
        return []
    mine = set(owned_keys(model, source.shapes))
    return [
        copied_entry(source, name) for name in source.shapes if name not in mine and not name.startswith(EMA_PREFIX)
    ]


def _config(config: Any, class_name: str, entries: list[Entry]) -> dict[str, Any]:
    """A component's config.json, for a reader of any version."""
    content = dict(config) if isinstance(config, Mapping) else config.to_dict()
    if not class_name.startswith("CLIP"):
        return {"_class_name": class_name, **{key: value for key, value in content.items() if not key.startswith("_")}}
    for key in ("dtype", "transformers_version", "_attn_implementation_autoset"):
        content.pop(key, None)
    torch_dtype = {"F16": "float16", "BF16": "bfloat16"}.get(entries[0].dtype, "float32")
    return {**content, "architectures": [class_name], "torch_dtype": torch_dtype}


def _write_scheduler(folder: Path, template: Path | None, model: ModelState) -> str:
    """Write the sampler's configuration: that of the folder the model came from, or the kind's. Returns its class."""
    own = template / "scheduler" / "scheduler_config.json" if template else None
    content = SCHEDULE | SAMPLERS[model.kind]
    if own is not None and own.is_file():
        content = read_config(own)
    if model.zero_terminal_snr and not content.get("rescale_betas_zero_snr"):
        content |= ZERO_TERMINAL_SNR
    content["prediction_type"] = "v_prediction" if model.v_prediction else "epsilon"
    _write_json(folder / "scheduler_config.json", content)
    return content.get("_class_name", SAMPLERS[model.kind]["_class_name"])


def _write_tokenizer(folder: Path, template: Path | None, pad_token: str) -> None:
    if template and (template / folder.name).is_dir():
        folder.mkdir()
        for name in TOKENIZER_FILES:
            if (template / folder.name / name).is_file():
                shutil.copyfile(template / folder.name / name, folder / name)
        return
    folder.mkdir()
    for name in ("vocab.json", "merges.txt"):
        shutil.copyfile(VOCABULARY / name, folder / name)
    special = {"bos_token": BEGIN, "eos_token": END, "unk_token": END, "pad_token": pad_token}
    _write_json(folder / "special_tokens_map.json", special)
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True, "errors": "replace"}
    _write_json(folder / "tokenizer_config.json", settings | special)


def _model_index(model: ModelState, scheduler: str) -> dict[str, Any]:
    index = {
        **{folder: [library, class_name] for folder, class_name, library, _ in _parts(model)},
        "scheduler": ["diffusers", scheduler],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "feature_extractor": [None, None],
    }
    if model.kind == "sdxl":
        return index | {
            "_class_name": "StableDiffusionXLPipeline",
            "tokenizer_2": ["transformers", "CLIPTokenizer"],
            "image_encoder": [None, None],
            "force_zeros_for_empty_prompt": True,
        }
    return index | {
        "_class_name": "StableDiffusionPipeline",
        "safety_checker": [None, None],
        "requires_safety_checker": False,
    }


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _replace_folder(partial: Path, path: Path, form: FolderForm) -> None:
    """Put `partial` in place of `path`, which is gone only when the new folder is there; beside what is foreign."""
    path = form.free_place(path)
    if not path.exists():
        partial.rename(path)
        flush_to_disk(path.parent)
        return
    old = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".old"))
    path.rename(old / path.name)
    partial.rename(path)
    flush_to_disk(path.parent)
    shutil.rmtree(old, ignore_errors=True)
