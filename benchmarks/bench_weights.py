"""How long two networks take to be merged into a full-size model, and how much memory: the tool, and the obvious way.

    python benchmarks/bench_weights.py [--kinds sd1 sdxl] [--rank 32] [--ways tool obvious] [--folder DIR]

Random weights in float16. The obvious way loads the model and the networks, adds the products and saves. The time is
that of the whole command. "own memory" is what the process holds at most beside mapped files (RssAnon), "largest" all
that counts as its own (VmHWM); Linux only.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from table import ROOT, print_table

from library.checkpoints.safetensors_io import Entry, save_file, write_entries
from library.checkpoints.weights import load_tensors, open_weights
from networks.key_names import DOWN, UP
from networks.low_rank import weight_change
from networks.weights.checkpoint_layers import checkpoint_layers
from tests.full_size import write_full_size

RATIOS = (0.7, 0.4)


def write_network(path: Path, model: Path, kind: str, rank: int, seed: int) -> Path:
    """A LoRA on every layer but those of convolution blocks, in float16."""
    generator = torch.Generator().manual_seed(seed)

    def entry(name: str, *shape: int) -> Entry:
        return Entry(name, "F16", shape, lambda: torch.randn(shape, generator=generator).mul_(0.02).half())

    entries: list[Entry] = []
    with open_weights(model) as weights:
        for layer in checkpoint_layers(weights.shapes, kind).values():
            if not layer.is_in_conv_block:
                outputs, *inputs = layer.shape
                one = (1,) * (len(inputs) - 1)
                entries += [
                    Entry(f"{layer.name}.alpha", "F16", (), lambda: torch.tensor(rank / 2).half()),
                    entry(f"{layer.name}.{DOWN}", rank, *inputs),
                    entry(f"{layer.name}.{UP}", outputs, rank, *one),
                ]
    write_entries(entries, path)
    return path


def merge_obviously(model: Path, networks: list[Path], output: Path, kind: str) -> None:
    with open_weights(model) as weights:
        layers = checkpoint_layers(weights.shapes, kind)
    tensors = load_tensors(model)
    for path, ratio in zip(networks, RATIOS, strict=True):
        parts = load_tensors(path)
        for key in parts:
            name, _, part = key.partition(".")
            if part == DOWN:
                slot = layers[name].slot
                whole = tensors[slot.key]
                weight = whole if slot.part is None else whole.chunk(3)[slot.part]
                scale = ratio * float(parts[f"{name}.alpha"]) / len(parts[key])
                change = weight_change(parts[key], parts[f"{name}.{UP}"], weight.shape)
                weight.copy_(weight.float() + scale * change)
    save_file(tensors, output)


def measured(words: list[str]) -> tuple[float, float, float, float]:
    """(seconds, seconds of computing, GB of own memory at most, GB in all at most) of a command."""
    start, before, own, largest = time.perf_counter(), computed(), 0, 0
    process = subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while process.poll() is None:
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        found = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "VmHWM"))}
        own, largest = max(own, found.get("RssAnon", 0)), max(largest, found.get("VmHWM", 0))
        time.sleep(0.02)
    if process.returncode:
        raise RuntimeError(process.stderr.read().decode() if process.stderr else "")
    return time.perf_counter() - start, computed() - before, own / 1e6, largest / 1e6


def computed() -> float:
    """Seconds that ended child processes have used, on all cores together."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def rows(kind: str, folder: Path, rank: int, ways: list[str]) -> list[list[str]]:
    model = write_full_size(folder / f"{kind}.safetensors", kind)
    networks = [write_network(folder / f"{name}.safetensors", model, kind, rank, i) for i, name in enumerate("ab")]
    output, found = folder / "out.safetensors", []
    commands = {
        "tool": ["networks/merge_lora.py", "--sd_model", model, "--models", *networks, "--ratios", *RATIOS,
                 "--save_to", output, "--save_precision", "fp16"],
        "obvious": [__file__, "--obvious", kind, model, *networks, output],
    }  # fmt: skip
    for way in ways:
        seconds, cpu, own, largest = measured([str(word) for word in commands[way]])
        size = f"{model.stat().st_size / 1e9:.1f} GB"
        found.append([kind, size, way, f"{seconds:.1f} s", f"{cpu:.1f} s", f"{own:.2f} GB", f"{largest:.2f} GB"])
        output.unlink()
    for path in (model, *networks):
        path.unlink()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=["sd1", "sdxl"], default=["sd1", "sdxl"])
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--ways", nargs="+", choices=["tool", "obvious"], default=["tool", "obvious"])
    parser.add_argument("--folder", help="where the files lie while it runs (up to 14 GB)")
    parser.add_argument("--obvious", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.obvious:
        kind, model, *networks, output = options.obvious
        merge_obviously(Path(model), [Path(path) for path in networks], Path(output), kind)
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        table = [row for kind in options.kinds for row in rows(kind, Path(name), options.rank, options.ways)]
    header = ["model", "file", "way", "time", "computing", "own memory", "largest"]
    print_table(f"Two networks of rank {options.rank} merged into a model", header, table)


if __name__ == "__main__":
    main()
