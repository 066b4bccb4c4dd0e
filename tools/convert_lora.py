"""Convert a LoRA between the trade's form and that of diffusers and PEFT. See docs/models_and_loras.md."""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass
from pathlib import Path

if __package__ in (None, ""):  # started as a file: the repository's folder is where library is
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.checkpoints.hashed_file import write_hashed_entries
from library.checkpoints.network_kind import KIND_NAMES, kind_by_header
from library.checkpoints.safetensors_io import watched, write_entries
from library.cli.output_places import output_file
from library.cli.tools import Tool
from library.options import OptionError, opt
from library.progress import progress_bar
from library.wording import counted
from networks.weights.file_identity import UNKNOWN
from networks.weights.lora_conversion import PRECISIONS, Converted, is_in_diffusers_form, to_diffusers, to_trade
from networks.weights.network_file import NetworkFile

logger = logging.getLogger(__name__)

FORMS = {"kohya": "the trade's form", "diffusers": "diffusers' form"}


@dataclass(frozen=True)
class ConvertOptions:
    """What is converted."""

    model_to_load: str = opt("", help="LoRA file in either form (.safetensors, or a pickle)")
    model_to_save: str = opt("", help=".safetensors file to write")
    to: str | None = opt(choices=tuple(FORMS), help="the form to write (default: the one the file does not have)")
    save_precision: str | None = opt(
        choices=tuple(PRECISIONS), help="precision of the written file (default: each tensor keeps its own)"
    )
    fold_alpha: bool = opt(
        False,
        help="to diffusers: multiply alpha / rank into the weights, for programs that don't read alphas from the "
        "header (diffusers before 0.34); without it the way back gives the same tensors",
    )


def convert(options: ConvertOptions) -> None:
    """Raises OptionError for what can't be converted; nothing is written then."""
    source = Path(options.model_to_load).expanduser()
    output = output_file(options.model_to_save, "model_to_save", {"the file to convert": [str(source)]})
    if output.suffix.lower() != ".safetensors":
        problem = f"{output} has no extension .safetensors, the only form that keeps what a LoRA's header says"
        raise OptionError("model_to_save", problem, "name a .safetensors file")
    with NetworkFile(source, "model_to_load") as file:
        converted, form = _converted(file, options)
        total = sum(entry.nbytes for entry in converted.entries)
        with progress_bar(desc="converting", unit="B", unit_scale=True, total=total) as bar:
            write = write_hashed_entries if form == "kohya" else write_entries
            write(watched(converted.entries, bar.update), output, converted.metadata)
        by_header = kind_by_header(file.metadata)
        kind = KIND_NAMES.get(file.kind) or (f"{KIND_NAMES[by_header]} (by its header)" if by_header else UNKNOWN)
    logger.info("%s: %s for %s in %s", output, counted(converted.modules, "module"), kind, FORMS[form])


def _converted(file: NetworkFile, options: ConvertOptions) -> tuple[Converted, str]:
    """What to write, and its form."""
    own = "diffusers" if is_in_diffusers_form(file) else "kohya"
    form = options.to or ("kohya" if own == "diffusers" else "diffusers")
    precision = PRECISIONS[options.save_precision] if options.save_precision else None
    if form == own:
        raise OptionError("--to", f"{file.path} already has {FORMS[form]}", "name the other form, or leave it out")
    if form == "kohya":
        if options.fold_alpha:
            raise OptionError("--fold_alpha", "has a meaning only on the way to diffusers' form", "leave it out")
        return to_trade(file, precision=precision), form
    return to_diffusers(file, precision=precision, folds_alpha=options.fold_alpha), form


TOOL = Tool(__doc__, ConvertOptions, convert, positionals=("model_to_load", "model_to_save"))

if __name__ == "__main__":
    sys.exit(TOOL.run())
