"""Convert a model, or a ControlNet, between the original single file and a Diffusers folder, either way.

SD 1.x, SD 2.x and SDXL. See docs/models_and_loras.md.
"""

from __future__ import annotations

import ast
import contextlib
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __package__ in (None, ""):  # started as a file: the repository's folder is where library is
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.checkpoints.diffusers_folder import save_control_net_folder, save_diffusers_folder
from library.checkpoints.model_spec import ModelSpec, model_spec_metadata
from library.checkpoints.network_kind import KIND_NAMES
from library.checkpoints.own_folders import CONTROL_NET_FOLDER, MODEL_FOLDER
from library.checkpoints.probe import resolve_model
from library.checkpoints.safetensors_io import DTYPES, NonFiniteError, TooLargeError, write_entries
from library.checkpoints.sd import save_single_file
from library.checkpoints.stored_control_net import StoredControlNet, is_control_net, stored_control_net
from library.checkpoints.stored_model import StoredModel, stored_model
from library.checkpoints.torch_file import write_torch_file
from library.checkpoints.weights import open_weights
from library.cli.output_places import output_file, refuse_loop
from library.cli.tools import Tool
from library.options import OptionError, opt, require
from library.progress import progress_bar

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

SOURCE, OUTPUT, REFERENCE = "model_to_load", "model_to_save", "--reference_model"
PRECISIONS = {"fp16": "F16", "bf16": "BF16", "float": "F32"}
SAFE = ".safetensors"


@dataclass(frozen=True)
class ConvertOptions:
    """What is converted, and how it is written."""

    model_to_load: str = opt("", help="model to convert: a .safetensors or .ckpt file, a Diffusers folder or a hub id")
    model_to_save: str = opt("", help="file to write (.safetensors or .ckpt), or Diffusers folder: a name without one")
    v1: bool = opt(False, help="the model is SD 1.x: stop if it is not (the kind is found from the file itself)")
    v2: bool = opt(False, help="the model is SD 2.x: stop if it is not")
    unet_use_linear_projection: bool = opt(
        False, help="the projections of SD 2.x's U-Net are matrices: stop if the file's are not"
    )
    fp16: bool = opt(False, help="write fp16; as --save_precision_as fp16")
    bf16: bool = opt(False, help="write bf16; as --save_precision_as bf16")
    float: bool = opt(False, help="write float32; as --save_precision_as float")
    save_precision_as: str = opt(
        "no", choices=(*PRECISIONS, "no"), help="precision to write (no: each tensor keeps its own)"
    )
    epoch: int | None = opt(help="epochs to add to the counter of a .ckpt file")
    global_step: int | None = opt(help="steps to add to the counter of a .ckpt file")
    reference_model: str | None = opt(
        help="to a Diffusers folder: a folder whose scheduler and tokenizers are taken; "
        "to a file: a file whose tensors beside the model are taken"
    )
    use_safetensors: bool = opt(False, help="write the weights of a Diffusers folder as .safetensors, not as .bin")
    metadata: str | None = opt(
        help="metadata for a .safetensors file, as a Python dictionary: \"{'name': 'my model', 'author': 'me'}\""
    )
    variant: str | None = opt(help="variant of the files of a Diffusers folder to read, such as fp16")

    def __post_init__(self) -> None:
        require(not (self.v1 and self.v2), "--v1", "stands beside --v2", "name one of them, or none")
        asked = [name for name in PRECISIONS if getattr(self, name)]
        asked += [self.save_precision_as] * (self.save_precision_as not in ("no", *asked))
        require(len(asked) < 2, f"--{' --'.join(asked)}", "are several precisions", "name one")
        require(self.metadata is None or self.is_safe, "--metadata", "only .safetensors files hold it", "leave it out")
        require(
            not (self.use_safetensors and self.is_file and not self.is_safe), "--use_safetensors",
            f"contradicts the name {self.model_to_save}", "name a .safetensors file",
        )  # fmt: skip

    @property
    def is_file(self) -> bool:
        """A name with an extension is a file's."""
        return bool(Path(self.model_to_save).suffix)

    @property
    def is_safe(self) -> bool:
        return Path(self.model_to_save).suffix.lower() == SAFE

    @property
    def precision(self) -> str | None:
        """As headers name it."""
        named = next((name for name in PRECISIONS if getattr(self, name)), self.save_precision_as)
        return PRECISIONS.get(named)


def convert(options: ConvertOptions) -> None:
    """Raises OptionError for what can't be converted, or written; then nothing is left behind."""
    metadata = _given_metadata(options.metadata)
    if options.is_safe or not options.is_file:
        for name in ("epoch", "global_step"):
            if getattr(options, name) is not None:
                logger.warning("--%s: no effect, only .ckpt files have counters", name)
    source = resolve_model(options.model_to_load, SOURCE)
    output = _output(options, source)
    with _told_of(options), progress_bar(desc="converting", unit="B", unit_scale=True, total=0) as bar:
        if is_control_net(source, SOURCE):
            what = _convert_control_net(options, source, output, metadata, bar)
        else:
            what = _convert_model(options, output, metadata, bar)
    form = "original" if options.is_file else "Diffusers"
    logger.info("%s: %s, %s layout, %s", output, what, form, options.precision or "each tensor in its own precision")


@contextlib.contextmanager
def _told_of(options: ConvertOptions) -> Iterator[None]:
    """What is wrong with a tensor is told with the file it is of."""
    try:
        yield
    except TooLargeError as error:
        raise TooLargeError(f"{options.model_to_load}: {error}") from None
    except NonFiniteError as error:
        raise NonFiniteError(f"{options.model_to_load}: {error}", "get the model again, or another one") from None


def _given_metadata(text: str | None) -> dict[str, str]:
    if text is None:
        return {}
    try:
        content = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        content = None
    if not isinstance(content, dict):
        raise OptionError("--metadata", f"{text!r} is no Python dictionary", "write it as \"{'title': 'my model'}\"")
    return {str(key): str(value) for key, value in content.items()}


def _output(options: ConvertOptions, source: Path) -> Path:
    needed = {"the model to convert": [str(source)]}
    if options.reference_model and Path(options.reference_model).exists():
        needed["the reference model"] = [options.reference_model]
    output = Path(options.model_to_save).expanduser()
    refuse_loop(output, OUTPUT)
    if options.is_file or output.is_file():
        return output_file(options.model_to_save, OUTPUT, needed)
    for what, paths in needed.items():
        if any(os.path.realpath(output) == os.path.realpath(Path(path).expanduser()) for path in paths):
            raise OptionError(OUTPUT, f"{output} is {what}, which would be replaced", "choose another folder")
    if output.exists() and not (MODEL_FOLDER.is_free(output) or CONTROL_NET_FOLDER.is_free(output)):
        raise OptionError(OUTPUT, f"{output} is there and is no Diffusers folder", "choose another folder")
    return output


def _torch_dtype(name: str | None) -> torch.dtype | None:
    import torch

    return getattr(torch, DTYPES[name][1]) if name else None


# ----------------------------------------------------------------------------------------- whole models


def _convert_model(options: ConvertOptions, output: Path, metadata: Mapping[str, str], bar: Any) -> str:
    with stored_model(options.model_to_load, SOURCE, variant=options.variant, done=bar.update) as model:
        kind = model.source.kind
        _check_assertions(options, model)
        tensors = [tensor for part in _parts(model) for tensor in part.values()]
        bar.total = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        if options.is_file:
            _write_file(options, model, output, metadata)
        else:
            save_diffusers_folder(
                model.state,
                model.configs,
                output,
                source=model.extras,
                dtype=_torch_dtype(options.precision),
                template=_template(options) or model.folder,
                safe_serialization=options.use_safetensors,
            )
    return f"{KIND_NAMES[kind]}{' that predicts velocity' if model.source.v_prediction else ''}"


def _parts(model: StoredModel) -> list[Mapping[str, torch.Tensor]]:
    state = model.state
    return [state.unet, state.text_encoder, state.text_encoder_2, state.vae]


def _check_assertions(options: ConvertOptions, model: StoredModel) -> None:
    kind = model.source.kind
    for flag, claimed in (("--v1", "sd1"), ("--v2", "sd2")):
        if getattr(options, flag.removeprefix("--")) and kind != claimed:
            problem = f"the model {options.model_to_load} is {KIND_NAMES[kind]}"
            raise OptionError(flag, problem, "leave it out: the kind is found by itself")
    if options.unet_use_linear_projection and not model.configs["unet"].get("use_linear_projection"):
        problem = f"the projections of {options.model_to_load} are convolutions"
        raise OptionError("--unet_use_linear_projection", problem, "leave it out: they stay what they are")


def _template(options: ConvertOptions) -> Path | None:
    """The folder whose scheduler and tokenizers are taken."""
    if options.reference_model is None:
        return None
    found = resolve_model(options.reference_model, REFERENCE)
    if not (found / "scheduler" / "scheduler_config.json").is_file():
        problem = f"{options.reference_model} is no Diffusers folder with a scheduler"
        raise OptionError(REFERENCE, problem, "name such a folder")
    return found


def _write_file(options: ConvertOptions, model: StoredModel, output: Path, metadata: Mapping[str, str]) -> None:
    spec = ModelSpec(model.source.kind, model.source.v_prediction, title=output.stem)
    said = {key: text for key, text in model.metadata.items() if key != "format"}
    if "modelspec.architecture" not in said:
        said |= model_spec_metadata(spec)
    dtype = _torch_dtype(options.precision)
    counters = options.epoch or 0, options.global_step or 0
    if options.reference_model is None:
        save_single_file(
            model.state, output, source=model.extras, dtype=dtype, metadata={**said, **metadata}, counters=counters
        )
        return
    reference = resolve_model(options.reference_model, REFERENCE)
    if reference.is_dir():
        raise OptionError(REFERENCE, f"{reference} is a folder", "name a file, whose tensors beside the model are kept")
    with open_weights(reference, REFERENCE) as weights:
        save_single_file(
            model.state, output, source=weights, dtype=dtype, metadata={**said, **metadata}, counters=counters
        )


# ------------------------------------------------------------------------------------------ ControlNets


def _convert_control_net(
    options: ConvertOptions, source: Path, output: Path, metadata: Mapping[str, str], bar: Any
) -> str:
    require(options.reference_model is None, REFERENCE, "means nothing for a ControlNet", "leave it out")
    kind = "sd1" if options.v1 else "sd2" if options.v2 else ""
    with stored_control_net(source, SOURCE, kind=kind, variant=options.variant, done=bar.update) as net:
        bar.total = sum(tensor.numel() * tensor.element_size() for tensor in net.state.values())
        if options.is_file:
            _write_original(options, net, output, metadata)
        else:
            dtype = _torch_dtype(options.precision)
            save_control_net_folder(
                net.state, net.config, output, dtype=dtype, safe_serialization=options.use_safetensors
            )
        return f"ControlNet of {KIND_NAMES[net.kind]}"


def _write_original(options: ConvertOptions, net: StoredControlNet, output: Path, metadata: Mapping[str, str]) -> None:
    entries = net.original_entries(options.precision)
    if options.is_safe:
        write_entries(entries, output, {**net.metadata, **metadata})
    else:
        write_torch_file(entries, output, lambda tensors: {"state_dict": tensors})


RENAMED = {"--save_precision ": "--save_precision_as "}  # what shared code calls it
TOOL = Tool(__doc__, ConvertOptions, convert, positionals=(SOURCE, OUTPUT), renamed=RENAMED)

if __name__ == "__main__":
    sys.exit(TOOL.run())
