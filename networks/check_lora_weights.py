"""List the weights of a LoRA: name, shape, mean and smallest magnitude. See docs/models_and_loras.md."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

if __package__ in (None, ""):  # started as a file: the repository's folder is where library is
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.checkpoints.weights import Weights, open_weights
from library.cli.tools import Tool
from library.options import OptionError, opt

PARTS = ("lora_up", "lora_down", "lora_A", "lora_B", "oft_")


@dataclass(frozen=True)
class CheckOptions:
    """What is listed."""

    file: str = opt("", help="file of a LoRA or OFT")
    show_all_keys: bool = opt(False, help="list all other keys too, such as alphas")


def check(options: CheckOptions) -> None:
    """Print the list as lines of CSV; OptionError for a file without such weights."""
    with open_weights(Path(options.file).expanduser(), "file") as weights:
        keys = [key for key in weights.shapes if any(part in key for part in PARTS)]
        if not keys and not options.show_all_keys:
            example = next(iter(weights.shapes), "no tensor")
            raise OptionError("file", f"{options.file} holds no LoRA (it has {example})", "see all with -s")
        print(f"number of LoRA weights: {len(keys)}")
        others = [key for key in weights.shapes if key not in frozenset(keys)] if options.show_all_keys else []
        for key in (*keys, *others):
            print(_line(key, weights))


def _line(key: str, weights: Weights) -> str:
    """ "name,(4-320),0.0123,1.2e-07": shape, mean and smallest magnitude in float32."""
    magnitudes = weights.tensor(key).float().abs()
    shape = "-".join(str(size) for size in weights.shapes[key])
    lowest = magnitudes.min().item() if magnitudes.numel() else float("nan")
    return f"{key},({shape}),{magnitudes.mean().item()},{lowest}"


TOOL = Tool(__doc__, CheckOptions, check, positionals=("file",), short={"show_all_keys": "-s"})

if __name__ == "__main__":
    sys.exit(TOOL.run())
