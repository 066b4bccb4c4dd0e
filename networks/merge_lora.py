"""Merge networks: LoRA and its relatives into a model, or LoRA files with each other. See docs/models_and_loras.md."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if __package__ in (None, ""):  # started as a file: the repository's folder is where library is
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.checkpoints.model_spec import ModelSpec, model_spec_metadata, resolution_of
from library.checkpoints.network_kind import KIND_NAMES
from library.checkpoints.safetensors_io import DTYPES
from library.cli.output_places import weights_file
from library.cli.tools import Tool
from library.options import OptionError
from library.progress import progress_bar
from library.wording import counted
from networks.weights.block_weights import parse_block_weights
from networks.weights.merge_inputs import Source, common_kind, predicts_velocity, titles
from networks.weights.merge_options import PRECISIONS, MergeOptions, SdMergeOptions
from networks.weights.network_file import NetworkFile

if TYPE_CHECKING:
    from networks.weights.merging_loras import MergedLoRA

logger = logging.getLogger(__name__)

# what a network's file says of the model it was made for, kept from the first input that has it
OF_BASE_MODEL = ("ss_v2", "ss_base_model_version")
WEAKENED = 0.05  # relative error of a change above which a user should know


def merge(options: MergeOptions) -> None:
    """Raises OptionError for what can't be merged or written; then nothing is left behind."""
    needed = {"the model": [options.sd_model] if options.sd_model else [], "one of the networks": options.models}
    output = weights_file(str(options.save_to), "--save_to", needed)
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(NetworkFile(Path(path).expanduser(), "--models")) for path in options.models]
        if options.sd_model is None:
            _merge_together(options, files, output)
        else:
            _merge_into_model(options, files, output, stack)
        if options.plot is not None:
            from networks.weights.merge_plot import draw_sum

            draw_sum(_sources(options, files, common_kind(files)), Path(options.plot).expanduser())


# ---------------------------------------------------------------------------------------------- into a model


def _merge_into_model(
    options: MergeOptions, files: list[NetworkFile], output: Path, stack: contextlib.ExitStack
) -> None:
    from library.checkpoints.sd import write_single_file
    from networks.weights.merging_models import Precisions, merged_model, open_model

    model = open_model(str(options.sd_model))
    weights = stack.enter_context(model.weights)
    _check_v2(options, model.kind, model.path)
    common_kind(files, (model.path, model.kind))
    saving = None if options.save_precision is None else PRECISIONS[options.save_precision]
    precisions = Precisions(PRECISIONS[options.precision], saving)
    metadata: dict[str, str] = {}
    if not options.no_metadata:
        from_all = [(Path(model.path).stem, weights.metadata), *((file.path.stem, file.metadata) for file in files)]
        v_prediction = _model_predicts_velocity(model.kind, weights.shapes, weights.metadata)
        metadata = model_spec_metadata(
            ModelSpec(
                model.kind,
                v_prediction,
                title=output.stem,
                resolution=resolution_of(weights.metadata),
                merged_from=titles(from_all),
            )
        )
    with progress_bar(desc="merging", unit="B", unit_scale=True, total=0) as bar:
        sources = _sources(options, files, model.kind)
        merged = merged_model(model, sources, precisions, ignore_unmatched=options.ignore_unmatched, on_done=bar.update)
        bar.total = sum(entry.nbytes for entry in merged.entries)
        write_single_file(merged.entries, output, weights, metadata)
    merged.report.log("The change of the model as it is written, relative to the exact one:")
    dtypes = ((entry.dtype, weights.dtypes[entry.name]) for entry in merged.entries)
    before = Counter(old for new, old in dtypes if new == precisions.calculation != old)
    if saving is None and before:
        told = ", ".join(f"{count} from {DTYPES[dtype][1]}" for dtype, count in before.most_common())
        logger.info("changed tensors are written as %s (%s); --save_precision writes all of the model in one precision",
                    DTYPES[precisions.calculation][1], told)  # fmt: skip
    if merged.report.total.error > WEAKENED:
        logger.warning("the precision of the file is too coarse for a change this small: use --save_precision float")
    kind, changed = KIND_NAMES[model.kind], counted(merged.num_changed, "tensor")
    logger.info("%s: %s, %s changed by %s", output, kind, changed, counted(len(files), "network"))


def _model_predicts_velocity(kind: str, shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str]) -> bool:
    from library.checkpoints.probe import says_v_prediction

    return says_v_prediction(shapes, metadata) or predicts_velocity(kind, [metadata])


# ---------------------------------------------------------------------------------------------- LoRA with LoRA


def _merge_together(options: MergeOptions, files: list[NetworkFile], output: Path) -> None:
    from library.checkpoints.hashed_file import write_hashed_entries
    from library.checkpoints.torch_file import write_torch_file
    from networks.weights.merging_loras import SumSettings, merged_lora

    kind = common_kind(files)
    _check_v2(options, kind, str(files[0].path))
    settings = SumSettings(
        "exact" if options.exact else "concatenated" if options.concat else "added",
        options.shuffle,
        PRECISIONS[options.precision],
        PRECISIONS[options.save_precision or options.precision],
    )
    with progress_bar(desc="merging", unit="module", total=0) as bar:
        sources = _sources(options, files, kind)
        merged = merged_lora(
            sources, settings, ignore_unmatched=options.ignore_unmatched, on_done=lambda name: bar.update()
        )
        bar.total = len(merged.ranks)
        if output.suffix.lower() == ".safetensors":
            write_hashed_entries(merged.entries, output, _network_metadata(options, files, kind, merged, output))
        else:
            write_torch_file(merged.entries, output)
    merged.report.log("What the file does, relative to the exact weighted sum of the networks:")
    if not options.exact and merged.report.total.error > 0.01:
        logger.warning("the file does not do the weighted sum of what the networks do, as the trade's formula "
                       "(ratios count twice, ranks are mixed) never does; use --exact for that")  # fmt: skip
    what = counted(len(merged.ranks), "module")
    logger.info("%s: %s, rank %s, alpha %s", output, what, merged.dim, merged.alpha)


def _network_metadata(
    options: MergeOptions, files: list[NetworkFile], kind: str, merged: MergedLoRA, output: Path
) -> dict[str, str]:
    metadata = {"ss_network_module": "networks.lora", "ss_network_dim": merged.dim, "ss_network_alpha": merged.alpha}
    for name in OF_BASE_MODEL:
        known = [file.metadata[name] for file in files if name in file.metadata]
        metadata |= {name: known[0]} if known else {}
    if options.no_metadata:
        return metadata
    kind = kind or _assumed_kind(options)
    spec = ModelSpec(
        kind,
        predicts_velocity(kind, [file.metadata for file in files]),
        adapter="lora",
        title=output.stem,
        merged_from=titles((file.path.stem, file.metadata) for file in files),
    )
    return metadata | model_spec_metadata(spec)


# ---------------------------------------------------------------------------------------------- both


def _sources(options: MergeOptions, files: list[NetworkFile], kind: str) -> list[Source]:
    is_sdxl = (kind or _assumed_kind(options)) == "sdxl"
    blocks = parse_block_weights(options.lbws, len(files), is_sdxl=is_sdxl)
    return [Source(file, ratio, weights) for file, ratio, weights in zip(files, options.ratios, blocks, strict=True)]


def _assumed_kind(options: MergeOptions) -> str:
    """Where no file tells: what the command is for."""
    if not isinstance(options, SdMergeOptions):
        return "sdxl"
    return "sd2" if options.v2 else "sd1"


def _check_v2(options: MergeOptions, kind: str, path: str) -> None:
    if isinstance(options, SdMergeOptions) and options.v2 and kind not in ("sd2", ""):
        raise OptionError("--v2", f"{path} is for {KIND_NAMES[kind]}", "leave the flag out")


REQUIRED = ("save_to", "models", "ratios")
TOOL = Tool(__doc__, SdMergeOptions, merge, required=REQUIRED)

if __name__ == "__main__":
    sys.exit(TOOL.run())
