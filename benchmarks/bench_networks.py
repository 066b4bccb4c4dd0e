"""What the network modules take: numbers of parameters, memory of a step on full-size models, speed on a tiny one.

Memory is what --plan estimates, on models without weights: batch 1, rank 16, activations in bf16, AdamW. Speed is that
of steps on a tiny SD 1.x U-Net on the CPU.

Run: python benchmarks/bench_networks.py
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from bench_step import OperationCounter, step
from table import print_table

from library.checkpoints.safetensors_io import encode_header, in_layout_order
from library.checkpoints.sd import model_entries
from library.families.base import LoadPlan
from library.families.options import ModelOptions, TextOptions
from library.families.sd import StableDiffusion
from library.families.sdxl import StableDiffusionXL
from library.models.options import AttentionOptions
from library.targets.network import NetworkTarget
from library.targets.options import NetworkOptions
from library.train import placement
from library.train.memory_estimate import StepShape, step_bytes
from tests.full_size import meta_state
from tests.tiny_models import tiny_sd_checkpoint

MIB = 2**20
CASES = (
    ("networks.lora", None),
    ("networks.lora_fa", None),
    ("networks.dylora", None),
    ("networks.dylora", ("unit=4",)),
)
MODELS = (("SD 1.5", "sd1", StableDiffusion(), 512), ("SDXL", "sdxl", StableDiffusionXL(), 1024))
CPU = torch.device("cpu")


def header_file(path: Path, kind: str) -> Path:
    """A full-size model's file that is its header and a hole: outlines read no more."""
    entries = in_layout_order(model_entries(meta_state(kind), torch.float16))
    head = encode_header(entries, None)
    path.write_bytes(head)
    os.truncate(path, len(head) + sum(entry.nbytes for entry in entries))
    return path


def row(family: Any, path: Path, size: int, module: str, arguments: tuple[str, ...] | None) -> list[str]:
    """Parameters and memory of a network on the U-Net."""
    memory = []
    target: Any = None
    for checkpointing in (False, True):
        plan = LoadPlan(torch.bfloat16, torch.bfloat16, torch.bfloat16, CPU)
        bundle = family.outline(ModelOptions(str(path)), plan)
        if checkpointing:
            placement.enable_gradient_checkpointing(bundle)
        options = NetworkOptions(module, 16, network_args=arguments, network_train_unet_only=True)
        target = NetworkTarget(options, TextOptions())
        target.setup(family, bundle, gradient_checkpointing=checkpointing)
        target.param_groups(1e-3)
        config: Any = SimpleNamespace(text=TextOptions())
        memory.append(step_bytes(config, family, bundle, target, StepShape(1, (size, size), 1)))
    everything = list(target.trained_module().parameters())
    trained = [parameter.numel() for parameter in everything if parameter.requires_grad]
    total = sum(parameter.numel() for parameter in everything)
    weights = 4 * total + 12 * sum(trained)  # float32; gradients, two moments
    return [
        " ".join((module, *(arguments or ()))), f"{sum(trained):,}", f"{len(trained):,}", f"{weights / MIB:.0f} MiB",
        *(f"{size / MIB:,.0f} MiB" for size in memory),
    ]  # fmt: skip


def speeds(folder: Path) -> list[list[str]]:
    """Steps per second and operations of each module on a tiny U-Net, in turn."""
    path, cases, times = tiny_sd_checkpoint(folder / "tiny.safetensors"), {}, {}
    for module, arguments in CASES:
        bundle = StableDiffusion().load(
            ModelOptions(str(path)), AttentionOptions(), LoadPlan(*[torch.float32] * 3, CPU)
        )
        options = NetworkOptions(module, 16, network_args=arguments, network_train_unet_only=True)
        target = NetworkTarget(options, TextOptions())
        target.setup(StableDiffusion(), bundle, gradient_checkpointing=False)
        target.on_epoch_start(1)
        parameters = [p for group in target.param_groups(1e-3) for p in group.parameters]
        name = " ".join((module, *(arguments or ())))
        cases[name], times[name] = (bundle.unet, torch.optim.AdamW(parameters, lr=1e-3, fused=True)), []
    latents, context = torch.randn(1, 4, 16, 16), torch.randn(1, 77, 64)
    for _ in range(7):
        for name, case in cases.items():
            start = time.perf_counter()
            for _ in range(3):
                step(*case, latents, context)
            times[name].append((time.perf_counter() - start) / 3)
    rows = []
    for name, case in cases.items():
        with OperationCounter() as counter:
            step(*case, latents, context)
        rows.append([name, f"{1 / sorted(times[name])[3]:.1f}", f"{sum(counter.counts.values())}"])
    return rows


def main() -> None:
    torch.set_num_threads(2)
    header = ["module", "trained", "tensors", "with gradients and AdamW", "activations", "with checkpointing"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for title, kind, family, size in MODELS:
            path = header_file(folder / f"{kind}.safetensors", kind)
            rows = [row(family, path, size, *case) for case in CASES]
            print_table(f"{title}, U-Net, rank 16, one picture of {size} x {size}", header, rows)
        print_table("A step on a tiny SD 1.x U-Net", ["module", "steps/s (median)", "operations"], speeds(folder))


if __name__ == "__main__":
    main()
