"""Merge LoRA files into one of a chosen rank: the best one for their weighted sum. See docs/models_and_loras.md."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if __package__ in (None, ""):  # started as a file: the repository's folder is where library is
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.checkpoints.model_spec import ModelSpec, model_spec_metadata
from library.cli.output_places import weights_file
from library.cli.tools import Tool
from library.progress import progress_bar
from library.wording import counted
from networks.weights.block_weights import parse_block_weights
from networks.weights.low_rank_options import SvdMergeOptions
from networks.weights.merge_inputs import Source, common_kind, predicts_velocity, titles
from networks.weights.network_file import NetworkFile

if TYPE_CHECKING:
    from networks.weights.low_rank_work import Results

logger = logging.getLogger(__name__)

# what a network's file says of the model it was made for, kept from the first input that has it
OF_BASE_MODEL = ("ss_v2", "ss_base_model_version")


def main(options: SvdMergeOptions) -> None:
    """Raises OptionError for what can't be merged or written; then nothing is left behind."""
    output = weights_file(str(options.save_to), "--save_to", {"one of the networks": options.models})
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(NetworkFile(Path(path).expanduser(), "--models")) for path in options.models]
        kind = common_kind(files)
        blocks = parse_block_weights(options.lbws, len(files), is_sdxl=kind == "sdxl" if kind else None)
        sources = [Source(*each) for each in zip(files, options.ratios, blocks, strict=True)]

        from library.checkpoints.hashed_file import write_network
        from networks.weights.stored_results import StoredResults
        from networks.weights.svd_merging import merge_by_svd

        with StoredResults(output.parent) as store:
            with progress_bar(desc="merging", unit="module", total=0) as bar:

                def on_done(modules: int) -> None:
                    bar.total = modules
                    bar.update()

                results = merge_by_svd(sources, options, store, on_done)
            write_network(store.entries, output, _metadata(options, files, kind, results, output))
    clamping = f"--clamp_quantile {options.clamp_quantile:g}" if options.clamp_quantile < 1 else ""
    title = "What the file does, relative to the weighted sum of the networks:"
    results.tell(title, plot=options.plot, way_out=clamping)
    ranks = f"rank {options.new_rank}"
    ranks += f", {options.new_conv_rank} for convolutions" if options.new_conv_rank else ""
    logger.info("%s: %s, %s", output, counted(len(results.ranks), "module"), ranks)


def _metadata(
    options: SvdMergeOptions, files: list[NetworkFile], kind: str, results: Results, output: Path
) -> dict[str, str]:
    dim, conv_dim = results.described(results.ranks)  # alphas are the same
    of_convs = int(conv_dim) if conv_dim.isdigit() else conv_dim
    metadata = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": dim,
        "ss_network_alpha": dim,
        "ss_network_args": json.dumps({"conv_dim": of_convs, "conv_alpha": of_convs}),
    }
    for name in OF_BASE_MODEL:
        known = [file.metadata[name] for file in files if name in file.metadata]
        metadata |= {name: known[0]} if known else {}
    if options.no_metadata:
        return metadata
    headers = [file.metadata for file in files]
    kind = kind or "sd1"
    spec = ModelSpec(
        kind,
        predicts_velocity(kind, headers),
        adapter="lora",
        title=output.stem,
        merged_from=titles((file.path.stem, file.metadata) for file in files),
    )
    return metadata | model_spec_metadata(spec)


TOOL = Tool(description=__doc__, group=SvdMergeOptions, work=main, required=("models", "ratios", "save_to"))

if __name__ == "__main__":
    sys.exit(TOOL.run())
