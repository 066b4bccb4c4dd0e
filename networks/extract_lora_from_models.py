"""Make a LoRA of the difference between a trained model and the one it began with. See docs/models_and_loras.md."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if __package__ in (None, ""):  # started as a file: the repository's folder is where library is
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.checkpoints.model_spec import ModelSpec, model_spec_metadata
from library.checkpoints.network_kind import KIND_NAMES
from library.checkpoints.probe import probe_any
from library.checkpoints.source import ModelSource
from library.checkpoints.weights import open_weights
from library.cli.output_places import weights_file
from library.cli.tools import Tool
from library.options import OptionError
from library.progress import progress_bar
from library.wording import counted
from networks.weights.low_rank_options import ExtractOptions
from networks.weights.merge_options import PRECISIONS

if TYPE_CHECKING:
    from networks.weights.extracting import Pair
    from networks.weights.low_rank_work import Results

logger = logging.getLogger(__name__)


def main(options: ExtractOptions) -> None:
    """Raises OptionError for what can't be extracted or written; then nothing is left behind."""
    org, tuned = str(options.model_org), str(options.model_tuned)
    output = weights_file(str(options.save_to), "--save_to", {"one of the models": [org, tuned]})
    source = _checked(options, org, tuned)
    with open_weights(Path(org).expanduser()) as original, open_weights(Path(tuned).expanduser()) as trained:
        from library.checkpoints.hashed_file import write_network
        from networks.weights.extracting import TwoModels, extract
        from networks.weights.low_rank_work import torch_dtype
        from networks.weights.stored_results import StoredResults

        precision = None if options.load_precision is None else torch_dtype(PRECISIONS[options.load_precision])
        models = TwoModels(original, trained, source.kind, precision, (org, tuned))
        with StoredResults(output.parent) as store:
            results = extract(models, options, store, _shown)
            write_network(store.entries, output, _metadata(options, source, results, output))
    clamping = f"--clamp_quantile {options.clamp_quantile:g}" if options.clamp_quantile < 1 else ""
    results.tell("What the LoRA does, relative to the difference of the models:", plot=options.plot, way_out=clamping)
    ranks = f"rank {options.dim}" + (f", {options.conv_dim} for convolutions" if options.conv_dim else "")
    logger.info("%s: %s, %s, %s", output, KIND_NAMES[source.kind], counted(len(results.ranks), "module"), ranks)


def _shown(pairs: list[Pair]) -> Iterator[Pair]:
    with progress_bar(desc="extracting", unit="layer", total=len(pairs)) as bar:
        for pair in pairs:
            yield pair
            bar.update()


def _checked(options: ExtractOptions, org: str, tuned: str) -> ModelSource:
    """What the original model is; OptionError unless both are single files of the kind that was said."""
    sources = [_single_file(org, "--model_org"), _single_file(tuned, "--model_tuned")]
    kinds = [source.kind for source in sources]
    if kinds[0] != kinds[1]:
        problem = f"{tuned} is {KIND_NAMES[kinds[1]]}, and {org} is {KIND_NAMES[kinds[0]]}"
        raise OptionError("--model_tuned", problem, "name the model that training began with as --model_org")
    for flag, is_said, kind in (("--v2", options.v2, "sd2"), ("--sdxl", options.sdxl, "sdxl")):
        if is_said and kinds[0] != kind:
            raise OptionError(flag, f"the models are {KIND_NAMES[kinds[0]]}", "remove the flag")
    return sources[0]


def _single_file(path: str, flag: str) -> ModelSource:
    found = Path(path).expanduser()
    if not found.exists():
        raise OptionError(flag, f"{path} does not exist", "check the path")
    if found.is_dir():
        raise OptionError(flag, f"{path} is a folder, and only single files are read", "convert it to one file first")
    return probe_any(str(found), flag=flag)


def _metadata(options: ExtractOptions, source: ModelSource, results: Results, output: Path) -> dict[str, str]:
    v_prediction = options.v_parameterization
    if v_prediction is None:
        v_prediction = source.v_prediction or source.kind == "sd2"
    base = {"sd1": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0"}[source.kind]
    (dim, conv_dim), (alpha, conv_alpha) = results.described(results.ranks), results.described(results.alphas)
    convs = {"conv_dim": conv_dim, "conv_alpha": conv_alpha} if options.conv_dim else {}
    metadata = {
        "ss_v2": str(source.kind == "sd2"),
        "ss_base_model_version": base + ("_v" if v_prediction and source.kind != "sdxl" else ""),
        "ss_network_module": "networks.lora",
        "ss_network_dim": dim,
        "ss_network_alpha": alpha,
        "ss_network_args": json.dumps(convs),
    }
    if options.no_metadata:
        return metadata
    spec = ModelSpec(source.kind, v_prediction, adapter="lora", title=output.stem)
    return metadata | model_spec_metadata(spec)


TOOL = Tool(
    description=__doc__,
    group=ExtractOptions,
    work=main,
    required=("model_org", "model_tuned", "save_to"),
    with_value=("v_parameterization",),
)

if __name__ == "__main__":
    sys.exit(TOOL.run())
