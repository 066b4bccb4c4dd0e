"""Merge models: the weighted sum of their weights. See docs/models_and_loras.md."""

from __future__ import annotations

import contextlib
import logging
import math
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

if __package__ in (None, ""):  # started as a file: the repository's folder is where library is
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.checkpoints.keymaps import V_PREDICTION_MARKER
from library.checkpoints.merging import (
    OUTSIDE_UNET,
    PRECISIONS,
    MergeSettings,
    ModelFile,
    Unmatched,
    merged_entries,
    open_model,
    unmatched,
)
from library.checkpoints.model_spec import ModelSpec, model_spec_metadata
from library.checkpoints.ratios import check_ratios
from library.checkpoints.safetensors_io import write_entries
from library.cli.output_places import output_file
from library.cli.tools import Tool
from library.options import OptionError, opt
from library.progress import progress_bar
from library.wording import counted

logger = logging.getLogger(__name__)

EXTENSION = ".safetensors"


@dataclass(frozen=True)
class MergeOptions:
    """What is merged, and how."""

    models: tuple[str, ...] = opt((), help="model files to merge; the first decides which tensors there are")
    output: str = opt("", help="file to write; .safetensors is added where it is missing")
    ratios: tuple[float, ...] | None = opt(help="weight of each model, used as it is; equal weights where not given")
    unet_only: bool = opt(False, help="merge the U-Nets; VAE and text encoders are the first model's")
    device: str = opt("cpu", help="device that computes, for example cuda")
    precision: str = opt("float", choices=tuple(PRECISIONS), help="precision of the computation")
    saving_precision: str = opt("float", choices=tuple(PRECISIONS), help="precision of the file")
    show_skipped: bool = opt(False, help="list the tensors that only some of the models have")
    add_metadata: bool = opt(False, help="note in the file what it is and what it was merged from (modelspec.*)")

    def __post_init__(self) -> None:
        if self.ratios is not None:
            check_ratios(self.ratios, len(self.models))


def merge(options: MergeOptions) -> None:
    """Raises OptionError for what can't be merged or written; then nothing is left behind."""
    name = options.output if options.output.lower().endswith(EXTENSION) else options.output + EXTENSION
    output = output_file(name, "--output", {"one of the models": options.models})
    with contextlib.ExitStack() as stack:
        models = [open_model(Path(path).expanduser(), "--models") for path in options.models]
        for model in models:
            stack.enter_context(model.weights)
        found = unmatched(models, "--models")
        ratios = options.ratios or (1 / len(models),) * len(models)
        _report(models, ratios, found, options)
        settings = MergeSettings(
            ratios, options.unet_only, options.precision, options.saving_precision, _device(options.device)
        )
        metadata = _metadata(models, output) if options.add_metadata else None
        with progress_bar(desc="merging", unit="B", unit_scale=True, total=0) as bar:
            entries = merged_entries(models, settings, bar.update)
            bar.total = sum(entry.nbytes for entry in entries)
            write_entries(entries, output, metadata)
    logger.info("%s: %s, %s", output, counted(len(entries), "tensor"), models[0].what)


def _report(
    models: Sequence[ModelFile], ratios: Sequence[float], found: Sequence[Unmatched], options: MergeOptions
) -> None:
    for model, ratio in zip(models, ratios, strict=True):
        logger.info("%g x %s (%s)", ratio, model.path, model.what)
    total = math.fsum(ratios)
    if abs(total - 1) > 1e-3:
        logger.warning("--ratios add up to %g: all weights are scaled by that", total)
    for model, lack in zip(models, found, strict=True):
        missing = [name for name in lack.missing if not (options.unet_only and _is_outside_unet(name))]
        for names, means in (
            (missing, "the first model's values stand in for what is not in it"),
            (lack.skipped, "left out, only in it"),
        ):
            if names:
                logger.warning("%s: %s: %s (%s)", model.path, means, counted(len(names), "tensor"), _parts(names))
                for name in names if options.show_skipped else ():
                    logger.info("  %s", name)
    kinds = {model.v_prediction for model in models}
    if len(kinds) > 1:
        for model in models:
            logger.warning(
                "%s predicts %s", model.path, "velocity" if model.v_prediction else "noise, as far as it says"
            )
    first = models[0]
    if first.v_prediction and V_PREDICTION_MARKER not in first.slots and not options.add_metadata:
        logger.warning("only its metadata say that %s predicts velocity: use --add_metadata to keep that", first.path)


def _is_outside_unet(name: str) -> bool:
    return any(part in name for part in OUTSIDE_UNET)


def _parts(names: Sequence[str]) -> str:
    """ "cond_stage_model 196, model_ema 1"."""
    return ", ".join(f"{part} {count}" for part, count in Counter(name.split(".")[0] for name in names).most_common())


def _device(name: str) -> str:
    import torch

    try:
        torch.zeros((), device=name)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise OptionError("--device", f"{name!r} is no device of this machine", "use cpu") from None
    return name


def _metadata(models: Sequence[ModelFile], output: Path) -> dict[str, str]:
    first = models[0]
    if not first.kind:
        raise OptionError("--add_metadata", f"{first.path} is {first.what}, which it can't describe", "leave it out")
    titles = [model.weights.metadata.get("modelspec.title") or model.path.stem for model in models]
    return model_spec_metadata(
        ModelSpec(first.kind, first.v_prediction, title=output.stem, merged_from=", ".join(titles))
    )


TOOL = Tool(__doc__, MergeOptions, merge, required=("models", "output"))

if __name__ == "__main__":
    sys.exit(TOOL.run())
