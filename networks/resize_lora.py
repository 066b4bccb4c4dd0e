"""Give a LoRA other ranks, the same for all modules or one for each by its singular values.

See docs/models_and_loras.md.
"""

from __future__ import annotations

import logging
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if __package__ in (None, ""):  # started as a file: the repository's folder is where library is
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.cli.output_places import weights_file
from library.cli.tools import Tool
from library.progress import progress_bar
from library.wording import counted
from networks.weights.low_rank_options import ResizeOptions
from networks.weights.network_file import NetworkFile

if TYPE_CHECKING:
    from networks.weights.low_rank_work import Results
    from networks.weights.resizing import Resized

logger = logging.getLogger(__name__)


def main(options: ResizeOptions) -> None:
    """Raises OptionError for what can't be resized or written; then nothing is left behind."""
    source = Path(str(options.model)).expanduser()
    output = weights_file(str(options.save_to), "--save_to", {"the LoRA that is read": [str(source)]})
    with NetworkFile(source, "--model") as file:
        from library.checkpoints.hashed_file import write_network
        from networks.weights.resizing import resize
        from networks.weights.stored_results import StoredResults

        with StoredResults(output.parent) as store:
            with progress_bar(desc="resizing", unit="module", total=len(file.modules)) as bar:
                resized = resize(file, options, store, bar.update)
            write_network(store.entries, output, _metadata(file.metadata, options, resized))
    results = resized.results
    if options.verbose:
        deviation = statistics.stdev(resized.retained) if len(resized.retained) > 1 else 0.0
        logger.info("Frobenius norm retained: average %.2f%%, deviation %.3f",
                    100 * statistics.mean(resized.retained), deviation)  # fmt: skip
    results.tell("What the file does, relative to the LoRA it was made from:", plot=options.plot)
    logger.info("%s: %s, rank %s", output, counted(len(results.ranks), "module"), _ranks_in_words(resized))


def _metadata(old: Mapping[str, str], options: ResizeOptions, resized: Resized) -> dict[str, str]:
    """The old notes with rank and alpha as they are now; ss_training_comment tells what happened."""
    comment, results = old.get("ss_training_comment", ""), resized.results
    before = _most(resized.old_ranks, results)
    if options.dynamic_method is None:
        told = f"dimension is resized from {before} to {_most(results.ranks, results)}; {comment}"
        dim, alpha = results.described(results.ranks)[0], results.described(results.alphas)[0]
    else:
        told = f"Dynamic resize with {options.dynamic_method}: {options.dynamic_param} from {before}; {comment}"
        dim = alpha = "Dynamic"
    return {**old, "ss_training_comment": told, "ss_network_dim": dim, "ss_network_alpha": alpha}


def _most(ranks: Mapping[str, int], results: Results) -> str:
    """The largest rank, and that of convolutions where it is another."""
    linear = max((rank for name, rank in ranks.items() if name not in results.convs), default=None)
    conv = max((rank for name, rank in ranks.items() if name in results.convs), default=None)
    if linear is None or conv is None or linear == conv:
        return str(linear if linear is not None else conv)
    return f"{linear} (conv: {conv})"


def _ranks_in_words(resized: Resized) -> str:
    ranks = resized.results.ranks.values()
    return f"{min(ranks)}" if min(ranks) == max(ranks) else f"{min(ranks)} to {max(ranks)}"


TOOL = Tool(description=__doc__, group=ResizeOptions, work=main, required=("model", "save_to"))

if __name__ == "__main__":
    sys.exit(TOOL.run())
