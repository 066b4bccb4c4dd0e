"""Steps per second and device operations of one training step on a tiny SD 1.x model, beside the plain formula.

The plain formula is y = base(x) + up(down(x)) * scale in separate operations, the way the method is usually written.
Run: python benchmarks/bench_step.py
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from table import print_table
from torch.utils._python_dispatch import TorchDispatchMode

from library.families.base import LoadPlan
from library.families.options import ModelOptions, TextOptions
from library.families.sd import StableDiffusion
from library.models.options import AttentionOptions
from library.targets.network import NetworkTarget
from library.targets.options import NetworkOptions
from tests.tiny_models import tiny_sd_checkpoint

VIEWS = ("view", "reshape", "t.", "transpose", "permute", "expand", "unsqueeze", "squeeze", "slice", "select", "detach",
         "alias", "_unsafe_view", "split", "unbind", "as_strided", "chunk")  # fmt: skip


class OperationCounter(TorchDispatchMode):
    """Counts what a device would have to run: every dispatched operation but views."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function).removeprefix("aten.")
        if not name.startswith(VIEWS):
            self.counts[name] += 1
        return function(*args, **(kwargs or {}))


class PlainLora(torch.nn.Module):
    """The usual formulation, for comparison only."""

    def __init__(self, module: torch.nn.Module, down: torch.Tensor, up: torch.Tensor, scale: float) -> None:
        super().__init__()
        self.original, self.scale = module.forward, scale
        self.down, self.up = torch.nn.Parameter(down.clone()), torch.nn.Parameter(up.clone())
        self.is_conv = isinstance(module, torch.nn.Conv2d)
        module.forward = self.forward

    def forward(self, x: torch.Tensor, *rest) -> torch.Tensor:
        product = torch.nn.functional.conv2d if self.is_conv else torch.nn.functional.linear
        return self.original(x) + product(product(x, self.down), self.up) * self.scale


def build(path: Path, *, plain: bool):
    """(unet, trained parameters) with a LoRA on the U-Net: ours, or the plain formulation on the same weights."""
    family = StableDiffusion()
    cpu = LoadPlan(torch.float32, torch.float32, torch.float32, torch.device("cpu"))
    bundle = family.load(ModelOptions(str(path)), AttentionOptions(), cpu)
    target = NetworkTarget(NetworkOptions("networks.lora", 8, network_train_unet_only=True), TextOptions())
    if not plain:
        torch.manual_seed(0)
        target.setup(family, bundle, gradient_checkpointing=False)
        parameters = [p for group in target.param_groups(1e-3) for p in group.parameters]
        return bundle.unet, parameters
    layers = []
    for block in [m for m in bundle.unet.modules() if type(m).__name__ == "Transformer2DModel"]:
        for module in block.modules():
            if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
                shape = module.weight.shape
                down, up = (
                    torch.randn(8, *shape[1:]) * 0.02,
                    torch.zeros(shape[0], 8, *([1, 1] if len(shape) == 4 else [])),
                )
                layers.append(PlainLora(module, down, up, 1 / 8))
    return bundle.unet, [p for layer in layers for p in layer.parameters()]


def step(unet: torch.nn.Module, optimizer: torch.optim.Optimizer, latents: torch.Tensor, context: torch.Tensor) -> None:
    prediction = unet(latents, torch.tensor([500]), context, return_dict=False)[0]
    (prediction - latents).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def main() -> None:
    torch.set_num_threads(2)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = tiny_sd_checkpoint(Path(folder) / "tiny.safetensors")
        cases = {}
        for name, plain in (("networks.lora", False), ("plain formula", True)):
            unet, parameters = build(path, plain=plain)
            optimizer = torch.optim.AdamW(parameters, lr=1e-3, fused=True)
            cases[name] = (unet, optimizer)
        latents, context = torch.randn(1, 4, 16, 16), torch.randn(1, 77, 64)
        times: dict[str, list[float]] = {name: [] for name in cases}
        for _ in range(7):  # in turn, so that a busy machine hits both alike
            for name, case in cases.items():
                start = time.perf_counter()
                for _ in range(3):
                    step(*case, latents, context)
                times[name].append((time.perf_counter() - start) / 3)
        for name, case in cases.items():
            with OperationCounter() as counter:
                step(*case, latents, context)
            median = sorted(times[name])[len(times[name]) // 2]
            rows.append((name, f"{1 / median:.1f}", sum(counter.counts.values()), ", ".join(
                f"{op} {count}" for op, count in counter.counts.most_common(5))))  # fmt: skip
    print_table(
        "One LoRA step (forward, backward, AdamW) on a tiny SD 1.x U-Net, float32, CPU",
        ("LoRA", "steps/s (median)", "operations", "most frequent"),
        rows,
    )


if __name__ == "__main__":
    main()
