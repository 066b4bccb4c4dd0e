"""Split a DyLoRA into LoRAs of all its ranks: one file for each multiple of --unit. See docs/models_and_loras.md."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if __package__ in (None, ""):  # started as a file: the repository's folder is where library is
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.checkpoints.hashed_file import write_hashed_entries
from library.checkpoints.safetensors_io import Entry, watched
from library.checkpoints.torch_file import write_torch_file
from library.cli.output_places import output_file, weights_file
from library.cli.tools import Tool
from library.options import opt, require
from library.progress import progress_bar
from library.wording import counted
from networks.key_names import DOWN, UP
from networks.weights.network_file import NetworkFile

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

SAFE = ".safetensors"
DYLORA = "networks.dylora"


@dataclass(frozen=True)
class SplitOptions:
    """What is split, and where the parts go."""

    unit: int | None = opt(help="distance of the ranks: with 4, files of the ranks 4, 8, 12 ... are written")
    save_to: str = opt("", help='file name of the parts: "cat.safetensors" makes "cat-0004.safetensors" and so on')
    model: str = opt("", help="DyLoRA file to split (.safetensors, or a pickle)")

    def __post_init__(self) -> None:
        require(self.unit is None or self.unit > 0, "--unit", f"{self.unit} is no rank", "use 1 or more")


def split(options: SplitOptions) -> None:
    """Raises OptionError for what can't be split or written."""
    assert options.unit is not None
    source, base = Path(options.model).expanduser(), weights_file(options.save_to, "--save_to", {})
    with NetworkFile(source, "--model") as file:
        most = max(map(file.rank, file.pairs), default=0)
        require(most > 0, "--model", f"{source} holds no LoRA", "name a file that networks.dylora has written")
        require(
            options.unit <= most, "--unit", f"{options.unit} is above the file's rank, {most}", f"use {most} or less"
        )
        ranks = [*range(options.unit, most, options.unit), most]
        outputs = {rank: base.with_name(f"{base.stem}-{rank:04}{base.suffix}") for rank in ranks}
        for output in outputs.values():
            output_file(str(output), "--save_to", {"the file to split": [str(source)]})
        _warn_of_training(file, options.unit)
        if earlier := [output.name for output in outputs.values() if output.exists()]:
            logger.warning("%s: replaced", ", ".join(earlier))
        parts = {rank: _entries(file, rank) for rank in ranks}
        total = sum(entry.nbytes for entries in parts.values() for entry in entries)
        with progress_bar(desc="splitting", unit="B", unit_scale=True, total=total) as bar:
            for rank, output in outputs.items():
                entries = watched(parts[rank], bar.update)
                if output.suffix.lower() == SAFE:
                    write_hashed_entries(entries, output, _metadata(file.metadata, most, rank))
                else:
                    write_torch_file(entries, output)
    logger.info("%s of %s: %s ... %s", counted(len(ranks), "rank"), source, outputs[ranks[0]].name, outputs[most].name)


def _warn_of_training(file: NetworkFile, unit: int) -> None:
    """Say where the header tells that the parts will be worse than those of a DyLoRA that is cut where it may be."""
    module = file.metadata.get("ss_network_module", "")
    if module and module != DYLORA:
        logger.warning("%s was trained with %s: only %s trains ranks so that fewer of them do well alone",
                       file.path, module, DYLORA)  # fmt: skip
        return
    try:
        trained = int(json.loads(file.metadata.get("ss_network_args", "{}")).get("unit") or 1)
    except (ValueError, TypeError, AttributeError):
        return
    if module and trained > 0 and unit % trained:
        logger.warning("%s was trained with unit=%d, so a multiple of %d is the --unit to use, not %d",
                       file.path, trained, trained, unit)  # fmt: skip


def _metadata(metadata: Mapping[str, str], most: int, rank: int) -> dict[str, str]:
    """The header of one part; its hashes are written with it."""
    comment = f"split from DyLoRA, rank {most} to {rank}"
    before = metadata.get("ss_training_comment", "")
    comment = f"{comment}; {before}" if before not in ("", "None") else comment
    return {**metadata, "ss_training_comment": comment, "ss_network_dim": str(rank)}


def _entries(file: NetworkFile, rank: int) -> list[Entry]:
    """Every tensor; of pairs the first `rank` rows of down and columns of up, with the alpha they have."""
    pairs = frozenset(file.pairs)
    return [
        _entry(file, name, part, key, rank if name in pairs and part in (DOWN, UP) else None)
        for name, parts in file.modules.items()
        for part, key in parts.items()
    ]


def _entry(file: NetworkFile, name: str, part: str, key: str, rank: int | None) -> Entry:
    shape = file.shape(name, part)
    if rank is not None:
        shape = (min(rank, shape[0]), *shape[1:]) if part == DOWN else (shape[0], min(rank, shape[1]), *shape[2:])

    def produce() -> torch.Tensor:
        tensor = file.tensor(name, part)
        if rank is None:
            return tensor
        return (tensor[:rank] if part == DOWN else tensor[:, :rank]).contiguous()

    return Entry(key, file.weights.dtypes[key], shape, produce)


TOOL = Tool(__doc__, SplitOptions, split, required=("unit", "model", "save_to"))

if __name__ == "__main__":
    sys.exit(TOOL.run())
