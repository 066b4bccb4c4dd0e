"""What previews cost: a round beside the denoising alone, and training steps between rounds beside steps without any.

Run: python benchmarks/bench_preview.py
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from table import ROOT, print_table

from library.cli.training import Script, parse
from library.families.sd import StableDiffusion
from library.generate.images import Engine
from library.targets.network import NetworkTarget
from library.targets.options import NetworkOptions
from library.train import placement, session
from library.train.loop import train_one_step
from library.train.preflight import check_before_start
from library.train.preview import Previews
from library.train.preview_files import Moment
from library.train.run import Run

PROMPTS = "a photo of sks cat --d 1 --s 10\nsks cat, close-up of an eye --d 2 --s 10\n"
SCRIPT = Script(
    description=__doc__ or "",
    family="library.families.sd:StableDiffusion",
    target="library.targets.network:NetworkTarget",
    target_options=NetworkOptions,
    tracker_name="bench_preview",
    other_script="",
)
ROUNDS, STEPS = 5, 6  # rounds, and steps before each


def build(folder: Path) -> Run:
    """The starter's run, with previews."""
    (folder / "prompts.txt").write_text(PROMPTS, encoding="utf-8")
    words = [
        "--config_file", str(ROOT / "starter" / "train.toml"),
        "--dataset_config", str(ROOT / "starter" / "dataset.toml"),
        "--output_dir", str(folder), "--logging_dir", str(folder / "log"), "--max_train_steps", "1000",
        "--sample_prompts", str(folder / "prompts.txt"), "--sample_every_n_steps", "1000000",
    ]  # fmt: skip
    config, _notes = parse(SCRIPT, words)
    assert config is not None
    checked = check_before_start(config, SCRIPT.other_script)
    target = NetworkTarget(checked.config.target, checked.config.text)
    accelerator = placement.make_accelerator(checked.config, autocast=target.needs_autocast)
    run = session.build_run(checked, StableDiffusion(), target, accelerator)
    run.open_log()
    return run


def seconds(action: Callable[[], Any]) -> float:
    start = time.perf_counter()
    action()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    rounds, alone, plain_steps, steps_between = [], [], [], []
    with tempfile.TemporaryDirectory() as folder:
        run = build(Path(folder))
        (previews,) = [callback for callback in run.callbacks if isinstance(callback, Previews)]
        requests = [preview.request for preview in previews.share]

        def draw_alone() -> None:
            with torch.no_grad(), placement.evaluating(run.model):
                Engine(run.family, run.bundle, previews.encoder).pictures(requests, show_progress=False)

        for _ in range(3):
            train_one_step(run)
        previews.draw(Moment(run.step))
        for _ in range(ROUNDS):  # in turn, so that a busy machine hits all alike
            plain_steps += [seconds(lambda: train_one_step(run)) for _ in range(STEPS)]
            alone.append(seconds(draw_alone))
            rounds.append(seconds(lambda: previews.draw(Moment(run.step))))
            steps_between += [seconds(lambda: train_one_step(run)) for _ in range(STEPS)]
        previews.at_end(run.step)
        run.log.close()
        run.batches.close()
    print_table(
        f"{len(requests)} pictures of 128 x 128 with 10 steps each, on the starter model with its LoRA; medians",
        ("what", "seconds"),
        [
            ("denoising and decoding alone", f"{statistics.median(alone):.2f}"),
            ("a round of previews", f"{statistics.median(rounds):.2f}"),
            ("a training step, before a round", f"{statistics.median(plain_steps):.3f}"),
            (f"a training step, of the {STEPS} after a round", f"{statistics.median(steps_between):.3f}"),
            ("the first training step after a round", f"{statistics.median(steps_between[::STEPS]):.3f}"),
        ],
    )


if __name__ == "__main__":
    main()
