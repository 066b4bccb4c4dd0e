"""Resizing, extracting and merging by SVD at full size: seconds, memory, and a full SVD of each product beside it.

    python benchmarks/bench_low_rank.py [--kinds sd1 sdxl] [--tools resize extract merge] [--folder DIR]

Files of random numbers are written into a temporary folder (SD 1.5: 4.5 GB, SDXL: 14.5 GB) and deleted. Tools run as
commands with all they do but the start of Python and torch (1.5 to 2 seconds); seconds are those of all cores together,
so that other work on the machine counts little; peak memory holds torch (250 MB) and the mapped pages of the files.
"full SVD" is `torch.linalg.svd` of each product or difference as matrix, as the trade does it: each shape is measured
once on one core and counted as often as the model has it.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from table import ROOT, print_table

from library.checkpoints.safetensors_io import Entry, save_file, write_entries
from library.checkpoints.weights import Weights, open_weights
from networks.weights.checkpoint_layers import CheckpointLayer, checkpoint_layers
from networks.weights.svd import product_svd
from tests.full_size import write_full_size

RANK, NEW_RANK, EXTRACTED = 128, 32, 64
NAMES = {"sd1": "SD 1.5", "sdxl": "SDXL"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="*", default=["sd1"], choices=NAMES)
    parser.add_argument("--tools", nargs="*", default=["resize", "extract", "merge"])
    parser.add_argument("--folder", type=Path, help="where the files go; a temporary folder without it")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[list[object]] = []
    for kind in arguments.kinds:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            rows += measured(kind, arguments.tools, Path(folder))
    print_table("Low-rank work, CPU seconds", ["work", "tool", "full SVD", "times faster", "peak memory"], rows)


def measured(kind: str, tools: list[str], folder: Path) -> Iterator[list[object]]:
    model = write_full_size(folder / "org.safetensors", kind, torch.float16)
    with open_weights(model) as weights:
        layers = {
            name: layer for name, layer in checkpoint_layers(weights.shapes, kind).items() if not layer.is_in_conv_block
        }
        if "extract" in tools:
            tuned = write_tuned(weights, layers, folder / "tuned.safetensors")
    full = seconds_of_all(layers, full_svd)
    if "extract" in tools:
        for method in ("exact", "randomized"):
            command = ["extract_lora_from_models.py", "--model_org", model, "--model_tuned", tuned, "--min_diff", 0]
            command += ["--dim", EXTRACTED, "--save_to", folder / "out.safetensors", "--save_precision", "fp16"]
            seconds, memory = run_tool([*command, "--svd_method", method])
            yield row(f"{NAMES[kind]}: extract rank {EXTRACTED}, {method}", seconds, full, memory)
    loras = [write_lora(layers, folder / f"lora{seed}.safetensors", seed) for seed in (1, 2)]
    output = ["--save_to", folder / "out.safetensors", "--save_precision", "fp16", "--new_rank", NEW_RANK]
    if "resize" in tools:
        algebra = seconds_of_all(layers, resizing)
        yield row(f"{NAMES[kind]}: resize {RANK} to {NEW_RANK}, the algebra alone", algebra, full, math.nan)
        seconds, memory = run_tool(["resize_lora.py", "--model", loras[0], *output])
        yield row(f"{NAMES[kind]}: resize {RANK} to {NEW_RANK}", seconds, full, memory)
    if "merge" in tools:
        seconds, memory = run_tool(["svd_merge_lora.py", "--models", *loras, "--ratios", 0.6, 0.4, *output])
        yield row(f"{NAMES[kind]}: SVD merge of two of rank {RANK} to {NEW_RANK}", seconds, full, memory)


def row(what: str, seconds: float, full: float, memory: float) -> list[object]:
    return [
        what,
        f"{seconds:.1f} s",
        f"{full:.0f} s",
        f"{full / seconds:.0f}",
        "" if math.isnan(memory) else f"{memory:.0f} MB",
    ]


WITH_MEMORY = """
import runpy, sys, time
sys.path.insert(0, "")
script, sys.argv = sys.argv[1], sys.argv[1:]
import torch, networks.weights.resizing
start = time.process_time()
try:
    runpy.run_path(script, run_name="__main__")
except SystemExit as end:
    assert not end.code, end.code
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(time.process_time() - start, peak)
"""


def run_tool(command: list[object]) -> tuple[float, float]:
    """(CPU seconds, peak memory in MB) of a tool of networks/, without the start of Python and torch."""
    words = [sys.executable, "-c", WITH_MEMORY, f"networks/{command[0]}", *map(str, command[1:])]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seconds, kilobytes = done.stdout.split()[-2:]
    return float(seconds), int(kilobytes) / 1024


def seconds_of_all(layers: Mapping[str, CheckpointLayer], work: Callable[[int, int], Callable[[], object]]) -> float:
    """CPU seconds of what `work` makes ready for each layer's (outputs, inputs)."""
    total = 0.0
    shapes = Counter((layer.shape[0], math.prod(layer.shape[1:])) for layer in layers.values())
    for (outputs, inputs), count in shapes.items():
        run = work(outputs, inputs)
        start = time.process_time()
        run()
        total += count * (time.process_time() - start)
    return total


def full_svd(outputs: int, inputs: int) -> Callable[[], object]:
    matrix = torch.randn(outputs, inputs)
    return lambda: torch.linalg.svd(matrix)


def resizing(outputs: int, inputs: int) -> Callable[[], object]:
    down, up = torch.randn(RANK, inputs), torch.randn(outputs, RANK)
    product_svd(down, up, keep=NEW_RANK)
    return lambda: product_svd(down, up, keep=NEW_RANK).factors(NEW_RANK)


# ---------------------------------------------------------------------------------------------- files


def write_lora(layers: Mapping[str, CheckpointLayer], path: Path, seed: int) -> Path:
    """A LoRA for all layers whose singular values fall like those of trained ones."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, layer in layers.items():
        one = (1, 1) if len(layer.shape) == 4 else ()
        down, up = factors(layer, generator)
        tensors[f"{name}.alpha"] = torch.tensor(float(RANK))
        tensors[f"{name}.lora_down.weight"] = down.reshape(RANK, *layer.shape[1:]).half()
        tensors[f"{name}.lora_up.weight"] = up.reshape(-1, RANK, *one).half()
    save_file(tensors, path)
    return path


def factors(layer: CheckpointLayer, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = math.prod(layer.shape[1:])
    down = torch.randn(RANK, inputs, generator=generator) * (0.03 * torch.arange(1, RANK + 1) ** -0.5)[:, None]
    return down, torch.randn(layer.shape[0], RANK, generator=generator) * 0.03


def write_tuned(weights: Weights, layers: Mapping[str, CheckpointLayer], path: Path) -> Path:
    """The model with a change in each layer: directions of falling strength, and noise in all others."""
    by_key: dict[str, list[CheckpointLayer]] = {}
    for layer in layers.values():
        by_key.setdefault(layer.slot.key, []).append(layer)
    generator = torch.Generator().manual_seed(3)

    def produce(key: str) -> torch.Tensor:
        tensor = weights.tensor(key).float()
        for layer in by_key.get(key, ()):
            down, up = factors(layer, generator)
            change = (up @ down).add_(torch.randn(len(up), down.shape[1], generator=generator), alpha=1e-3)
            part = tensor if layer.slot.part is None else tensor.chunk(3)[layer.slot.part]
            part.add_(change.reshape(layer.shape))
        return tensor.to(weights.tensor(key).dtype)

    entries = [
        Entry(key, weights.dtypes[key], shape, lambda key=key: produce(key)) for key, shape in weights.shapes.items()
    ]
    write_entries(entries, path, {})
    return path


if __name__ == "__main__":
    main()
