"""Generation: from the command to the first picture, and pictures per minute beside a plain diffusers pipeline.

Run: python benchmarks/bench_generation.py [--full_size] [--rounds N]
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline
from table import ROOT, print_table, run_command

from library.families.base import LoadPlan, ModelBundle
from library.families.options import ModelOptions
from library.families.sd import StableDiffusion
from library.generate.conditions import PromptEncoder
from library.generate.images import Engine
from library.generate.request import GenerationRequest
from library.models.options import AttentionOptions
from tests.full_size import write_full_size

STARTER = ROOT / "starter" / "model.safetensors"
BATCHES = (1, 4)
SCALE = 7.5
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
THEIR_START = """
import sys, torch
from diffusers import StableDiffusionPipeline
pipeline = StableDiffusionPipeline.from_pretrained(sys.argv[1], safety_checker=None, local_files_only=True)
pipeline.set_progress_bar_config(disable=True)
generator = torch.Generator().manual_seed(1)
image = pipeline("a cat", width=128, height=128, num_inference_steps=4, generator=generator).images[0]
image.save(sys.argv[2])
"""


class Seconds(NamedTuple):
    """Of one run; those of the CPU change less on a busy machine."""

    wall: float
    cpu: float


def cpu_of_children() -> float:
    used = os.times()
    return used.children_user + used.children_system


def loaded(path: Path) -> ModelBundle:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    plan = LoadPlan(torch.float32, torch.float32, torch.float32, device)
    return StableDiffusion().load(ModelOptions(pretrained_model_name_or_path=str(path)), AttentionOptions(), plan)


def as_folder(bundle: ModelBundle, folder: Path) -> Path:
    StableDiffusion().save(bundle, folder, dtype=None, metadata={}, as_diffusers=True)
    return folder


def start_up(folder: Path, repeats: int = 3) -> None:
    """Whole processes: the command line, and the shortest script over diffusers, with the same model and four steps."""
    ours: list[Seconds] = []
    theirs: list[Seconds] = []
    words = ["--W", "128", "--H", "128", "--steps", "4", "--sampler", "ddim", "--outdir", str(folder / "out")]
    model = as_folder(loaded(STARTER), folder / "model")
    for _ in range(repeats):
        for times, command in (
            (ours, ("gen_img_diffusers.py", "--ckpt", STARTER, "--prompt", "a cat", *words)),
            (theirs, ("-c", THEIR_START, model, folder / "theirs.png")),
        ):
            start = Seconds(time.perf_counter(), cpu_of_children())
            done = run_command(*command)
            times.append(Seconds(time.perf_counter() - start.wall, cpu_of_children() - start.cpu))
            if done.returncode:
                raise SystemExit(done.stderr)
    best = [Seconds(min(each.wall for each in times), min(each.cpu for each in times)) for times in (ours, theirs)]
    rows = [
        (name, f"{each.wall:.2f}", f"{each.cpu:.2f}") for name, each in zip(("ours", "diffusers"), best, strict=True)
    ]
    rows.append(("ratio", f"{best[1].wall / best[0].wall:.2f} x", f"{best[1].cpu / best[0].cpu:.2f} x"))
    title = f"Seconds from the command to the first picture, best of {repeats} whole processes"
    print_table(title, ("what", "wall", "CPU"), rows)


def throughput(name: str, path: Path, size: int, steps: int, rounds: int) -> list[tuple[str, ...]]:
    """Pictures per minute, ours and theirs in turn, so that a busy machine hits both alike."""
    bundle = loaded(path)
    with tempfile.TemporaryDirectory() as folder:
        pipeline = StableDiffusionPipeline.from_pretrained(
            as_folder(bundle, Path(folder) / "model"), safety_checker=None, local_files_only=True
        ).to(next(bundle.unet.parameters()).device)
    pipeline.scheduler = EulerDiscreteScheduler(steps_offset=1, timestep_spacing="linspace", **BETAS)
    pipeline.set_progress_bar_config(disable=True)
    engine = Engine(StableDiffusion(), bundle, PromptEncoder(StableDiffusion(), bundle))
    rows = []
    for batch in BATCHES:
        requests = [GenerationRequest("a cat", "", size, size, steps, SCALE, s, "euler") for s in range(batch)]

        def ours(requests: list[GenerationRequest] = requests) -> None:
            engine.encoder.forget()  # as theirs, which encodes each time
            engine.pictures(requests, show_progress=False)

        def theirs(batch: int = batch) -> None:
            pipeline(
                ["a cat"] * batch, width=size, height=size, num_inference_steps=steps, guidance_scale=SCALE,
                generator=[torch.Generator().manual_seed(seed) for seed in range(batch)],
            )  # fmt: skip

        times = in_turn([ours, theirs], rounds)
        pairs = list(zip(*times, strict=True))
        wall = statistics.median(other.wall / own.wall for own, other in pairs)
        cpu = statistics.median(other.cpu / own.cpu for own, other in pairs)
        per_minute = [f"{60 * batch / statistics.median(item.wall for item in each):.1f}" for each in times]
        rows.append((f"{name}, {size} px, {steps} steps", str(batch), *per_minute, f"{wall:.2f} x", f"{cpu:.2f} x"))
    return rows


def in_turn(actions: list[Callable[[], None]], rounds: int) -> list[list[Seconds]]:
    """Seconds of each action in each round, after a round that is not counted."""
    times: list[list[Seconds]] = [[] for _ in actions]
    for number in range(rounds + 1):
        for action, seconds in zip(actions, times, strict=True):
            start = Seconds(time.perf_counter(), time.process_time())
            action()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if number:
                seconds.append(Seconds(time.perf_counter() - start.wall, time.process_time() - start.cpu))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full_size", action="store_true", help="SD 1.5's size, too, with random weights")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        start_up(Path(folder))
        rows = throughput("starter model", STARTER, 128, 20, arguments.rounds)
        if arguments.full_size:
            path = write_full_size(Path(folder) / "sd15.safetensors", "sd1")
            rows += throughput("SD 1.5's size", path, 256, 4, max(1, arguments.rounds // 2))
    print_table(
        "Pictures per minute, medians; ratios are medians of their time over ours, round by round",
        ("model", "batch", "ours", "diffusers", "wall", "CPU"),
        rows,
    )


if __name__ == "__main__":
    main()
