"""How long training waits while a full-size SD 1.5 is saved, at once and beside the next update; what saving takes.

    python benchmarks/bench_save_full.py [--repeats 3] [--seconds 8] [--tables forms updates] [--places elsewhere here]

One update is made of batches that either compute here (the U-Net at 128 x 128, on the cores that also write) or wait
for another device, as with a GPU (`--seconds` of nothing). "blocked" is how long the loop stood still for the file,
"longer" how much longer the update took than one without a file. The file is flushed to the disk in all cases.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from table import print_table

from library.families.base import LoadPlan, ModelBundle
from library.families.options import ModelOptions
from library.families.sd import StableDiffusion
from library.models.options import AttentionOptions
from library.targets.base import ParamGroup
from library.train.background_save import BackgroundSave
from library.train.optimizers import build_optimizer
from library.train.options import OptimizerOptions
from library.train.updates import Updates
from tests.full_size import write_full_size

FAMILY = StableDiffusion()
CPU = torch.device("cpu")
BATCHES = 4  # of one update
FORMS = {  # name -> (file or folder, dtype, safe_serialization)
    "safetensors, as trained": ("a.safetensors", None, True),
    "safetensors, fp16": ("b.safetensors", torch.float16, True),
    "ckpt, as trained": ("c.ckpt", None, True),
    "ckpt, fp16": ("d.ckpt", torch.float16, True),
    "diffusers_safetensors, fp16": ("e", torch.float16, True),
    "diffusers (.bin), fp16": ("f", torch.float16, False),
}


def load(path: Path) -> ModelBundle:
    bundle = FAMILY.load(
        ModelOptions(str(path)), AttentionOptions(), LoadPlan(torch.float32, torch.float32, torch.float32, CPU)
    )
    bundle.unet.requires_grad_(True)
    return bundle


def save(bundle: ModelBundle, folder: Path, form: str) -> None:
    name, dtype, is_safe = FORMS[form]
    as_diffusers = not Path(name).suffix
    FAMILY.save(bundle, folder / name, dtype=dtype, metadata={}, as_diffusers=as_diffusers, safe_serialization=is_safe)


class Loop:
    """Updates of the U-Net, made like those of a run; all but the data."""

    def __init__(self, bundle: ModelBundle, batch: Callable[[], None]) -> None:
        parameters = tuple(bundle.unet.parameters())
        built = build_optimizer(OptimizerOptions("SGD", learning_rate=1e-9), [ParamGroup("unet", parameters, None)])
        accelerator = Accelerator(cpu=True)
        optimizer = accelerator.prepare_optimizer(built.optimizer)
        self.updates = Updates(accelerator, optimizer, parameters, max_grad_norm=1.0, wide=built.wide)
        self.batch, self.save, self.blocked = batch, BackgroundSave(CPU), 0.0
        self.updates.before_change = partial(self.standing_still, self.save.wait)

    def standing_still(self, action: Callable[[], None]) -> None:
        start = time.perf_counter()
        action()
        self.blocked += time.perf_counter() - start

    def update(self, write: Callable[[], None] | None = None, *, is_beside: bool = False) -> tuple[float, float]:
        """(seconds blocked, seconds) of one update with a file before it, if any."""
        start, self.blocked = time.perf_counter(), 0.0
        if write is not None:
            self.standing_still(partial(self.save.begin, write, _raise) if is_beside else write)
        for _ in range(BATCHES):
            self.batch()
        self.updates.clip()
        self.updates.apply(torch.tensor(True))
        self.updates.optimizer.zero_grad(set_to_none=True)
        return self.blocked, time.perf_counter() - start


def _raise(error: Exception | None) -> None:
    if error is not None:
        raise error


def compute(bundle: ModelBundle) -> None:
    noised, context = torch.randn(1, 4, 16, 16), torch.randn(1, 77, 768)
    bundle.unet(noised, torch.tensor([500]), context).sample.square().mean().backward()


def blocked_rows(
    bundle: ModelBundle, folder: Path, repeats: int, batches: dict[str, Callable[[], None]]
) -> list[list[str]]:
    rows = []
    for place, batch in batches.items():
        loop = Loop(bundle, batch)
        for form in ("safetensors, fp16", "safetensors, as trained"):
            write = partial(save, bundle, folder, form)
            times = [(loop.update(), loop.update(write), loop.update(write, is_beside=True)) for _ in range(repeats)]
            alone, at_once, beside = (
                [statistics.median(column) for column in zip(*way, strict=True)] for way in zip(*times, strict=True)
            )
            rows.append(
                [
                    place, form, f"{alone[1]:.1f} s", f"{at_once[0]:.2f} s", f"{beside[0]:.2f} s",
                    f"{at_once[1] - alone[1]:+.1f} s", f"{beside[1] - alone[1]:+.1f} s",
                ]
            )  # fmt: skip
    return rows


def memory_rows(bundle: ModelBundle, folder: Path) -> list[list[str]]:
    rows = []
    for form, (name, *_) in FORMS.items():
        before = _memory("VmRSS", reset=True)
        start = time.perf_counter()
        save(bundle, folder, form)
        seconds, most = time.perf_counter() - start, _memory("VmHWM") - before
        path = folder / name
        size = sum(file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        rows.append([form, f"{size / 1e9:.2f} GB", f"{seconds:.1f} s", f"{max(most, 0) / 1e6:.0f} MB"])
    return rows


def _memory(name: str, *, reset: bool = False) -> int:
    """Bytes this process has, or had at most since the last reset; Linux only."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--places", nargs="+", choices=["elsewhere", "here"], default=["elsewhere", "here"])
    parser.add_argument("--tables", nargs="+", choices=["forms", "updates"], default=["forms", "updates"])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bundle = load(write_full_size(folder / "model.safetensors", "sd1"))
        if "forms" in options.tables:
            header = ["form", "size", "time", "memory beside the model"]
            print_table("Saving a full-size SD 1.5 held in float32", header, memory_rows(bundle, folder))
        if "updates" in options.tables:
            header = ["batches compute", "file", "update alone", "blocked at once", "blocked beside"]
            header += ["longer at once", "longer beside"]
            kinds = {"elsewhere": partial(time.sleep, options.seconds / BATCHES), "here": partial(compute, bundle)}
            batches = {place: kinds[place] for place in options.places}
            rows = blocked_rows(bundle, folder, options.repeats, batches)
            print_table("An update with a file", header, rows)


if __name__ == "__main__":
    main()
