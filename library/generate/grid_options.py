"""Options of contact sheets: the same prompts and seeds with several networks, multipliers and models."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from library.generate.options import check_factor
from library.options import OptionError, opt, require

NETWORKS = "--grid_networks"
NETWORK_FILES = (".safetensors", ".pt", ".ckpt", ".bin")
LAST = "\U0010ffff"  # behind every letter


@dataclass(frozen=True)
class GridOptions:
    """Contact sheets: pictures side by side, on one picture and on one page for a browser."""

    grid: bool = opt(
        False,
        help="put the pictures on a contact sheet, too (grid.png) and on a page for a browser (grid.html); "
        "each of the next three options does so, too",
    )
    grid_networks: tuple[str, ...] | None = opt(
        help="networks to compare, a column each: files, or a folder for all of its network files, the epochs of one "
        "training in their order"
    )
    grid_multipliers: tuple[float, ...] | None = opt(
        help="multipliers to try each of --grid_networks with, a row each; 1 without this option, 0 is without network"
    )
    grid_ckpts: tuple[str, ...] | None = opt(help="models to compare with that of --ckpt, a column each, or a row")
    grid_network_module: str = opt("networks.lora", help="Python module of --grid_networks")

    def __post_init__(self) -> None:
        has_networks = self.grid_networks is not None
        way_out = "name files or a folder with --grid_networks"
        require(has_networks or self.grid_multipliers is None, "--grid_multipliers", "there is no network", way_out)
        for multiplier in self.grid_multipliers or ():
            check_factor("--grid_multipliers", multiplier, "0.5")

    @property
    def is_on(self) -> bool:
        """Whether there will be a sheet."""
        return self.grid or self.grid_networks is not None or self.grid_ckpts is not None

    @property
    def multipliers(self) -> tuple[float, ...]:
        return tuple(dict.fromkeys(self.grid_multipliers or (1.0,)))

    def network_files(self) -> tuple[str, ...]:
        """Each file once, those of folders in natural order; OptionError for what is not there."""
        files: list[str] = []
        for name in self.grid_networks or ():
            path = Path(name)
            if path.is_dir():
                found = in_training_order(item for item in path.iterdir() if item.suffix.lower() in NETWORK_FILES)
                require(bool(found), NETWORKS, f"{path} holds no network file", "name another folder, or files")
                files += map(str, found)
            elif path.is_file():
                files.append(name)
            else:
                raise OptionError(NETWORKS, f"{path} does not exist", "check the path")
        return tuple(dict.fromkeys(files))


def in_training_order(paths: Iterable[Path]) -> list[Path]:
    """By name, numbers in it as numbers: mine-000002, mine-000010, and mine, the finished one, behind them."""

    def key(path: Path) -> list[str | int]:
        parts = re.split(r"(\d+)", path.stem.lower() + LAST)  # texts and numbers in turn
        return [int(part) if index % 2 else part for index, part in enumerate(parts)]

    return sorted(paths, key=lambda path: (key(path), path.name))
