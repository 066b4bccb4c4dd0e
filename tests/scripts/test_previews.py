"""Previews while training: the pictures, their files, and that training does not notice them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gen_img_diffusers import SCRIPT as GENERATOR
from library.cli import generation
from library.generate import images as drawing
from library.generate.conditions import PromptEncoder
from tests.runs import ENVIRONMENT, ROOT, equal_files, flags, train_network

PROMPTS = "a disc --n square --d 7 --s 3 --l 5 --ss euler_a\na (cat:1.3) BREAK a dog --s 2\n"


def with_previews(options: dict, folder: Path, text: str = PROMPTS, **settings) -> dict:
    prompts = folder / "prompts.txt"
    prompts.write_text(text, encoding="utf-8")
    return {**options, "output_dir": folder / "drawn", "sample_prompts": prompts, "sample_sampler": "euler", **settings}


def pictures(folder: Path, index: int = 0) -> list[Path]:
    """The pictures of one prompt, in the order of rounds."""
    found = (folder / "drawn" / "sample").glob(f"net_*_{index:02d}_*.png")
    return sorted(found, key=lambda path: path.name.split("_")[1])


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


# ---------------------------------------------------------------------------------------------- training


EXACT = {
    "as it is": {},
    "cached latents": {"cache_latents": True},
    "gradient checkpointing and dropout": {"gradient_checkpointing": True, "network_dropout": 0.3},
    "averaged weights": {"ema_decay": 0.9},
    "half precision": {"mixed_precision": "bf16", "network_train_unet_only": True},
}


@pytest.mark.parametrize("name", EXACT)
def test_training_does_not_notice_previews(options, tmp_path, plain_run, name):
    without = plain_run
    if EXACT[name]:
        assert train_network(**options, **EXACT[name]) == 0
        without = tmp_path / "out" / "net.safetensors"
    settings = {**EXACT[name], "sample_at_first": True, "sample_every_n_steps": 1}
    assert train_network(**with_previews(options, tmp_path, **settings)) == 0
    assert equal_files(without, tmp_path / "drawn" / "net.safetensors")
    assert len(pictures(tmp_path)) == len(pictures(tmp_path, 1)) == 4


def test_resumed_in_between_previews(options, tmp_path):
    """The same weights and pictures as without a stop; the sheet goes on where it was."""
    whole = with_previews(options, tmp_path, sample_every_n_steps=1, save_every_n_steps=2, save_state=True)
    assert train_network(**whole) == 0
    first = {path.name.split("_")[1]: pixels(path) for path in pictures(tmp_path)}
    last = pictures(tmp_path)[-1]
    sheet = tmp_path / "drawn" / "sample" / "net_prompt00.png"
    complete = pixels(sheet)
    last.unlink()
    (tmp_path / "drawn" / "net.safetensors").rename(tmp_path / "whole.safetensors")
    again = {**whole, "resume": tmp_path / "drawn" / "net-step00000002-state", "sample_at_first": True}
    assert train_network(**again) == 0
    assert equal_files(tmp_path / "whole.safetensors", tmp_path / "drawn" / "net.safetensors")
    assert list(first) == ["000001", "000002", "000003"]
    assert np.array_equal(pixels(pictures(tmp_path)[-1]), first["000003"])
    assert np.array_equal(pixels(sheet), complete)


@pytest.mark.parametrize("unet_only", [True, False])
def test_prompts_are_encoded_once_unless_the_text_encoder_learns(options, tmp_path, monkeypatch, unet_only):
    encoded = []
    encode = PromptEncoder._encode
    monkeypatch.setattr(PromptEncoder, "_encode", lambda *given: encoded.append(1) or encode(*given))
    settings = {"network_train_unet_only": unet_only, "sample_every_n_steps": 1}
    assert train_network(**with_previews(options, tmp_path, "a --n b --s 1\nc --n b --s 1", **settings)) == 0
    assert len(encoded) == (3 if unet_only else 9)


# ---------------------------------------------------------------------------------------------- pictures


def test_a_preview_is_what_the_generator_draws(options, tmp_path):
    settings = {"sample_at_first": True, "sample_every_n_steps": 3, "clip_skip": 2, "network_alpha": 64}
    options |= {"resolution": "64,72", "learning_rate": 1e-2}
    assert train_network(**with_previews(options, tmp_path, **settings)) == 0
    drawn = tmp_path / "drawn"
    words = flags(
        ckpt=options["pretrained_model_name_or_path"], prompt="a disc", outdir=tmp_path / "generated", seed=7, W=64,
        H=72, steps=3, scale=5, sampler="euler_a", clip_skip=2, max_embeddings_multiples=3,
        network_module="networks.lora", network_weights=drawn / "net.safetensors",
    )  # fmt: skip
    words[words.index("a disc")] = "a disc --n square"
    assert generation.run(GENERATOR, words) == 0
    (generated,) = (tmp_path / "generated").glob("*.png")
    first, last = pictures(tmp_path)
    assert pixels(last).shape == (72, 64, 3)
    assert np.abs(pixels(last) - pixels(generated)).mean() < 0.1
    assert np.abs(pixels(first) - pixels(generated)).mean() > 2, "the network changes the picture"


def test_names_and_what_web_user_interfaces_read(options, tmp_path, tiny_sd1_path):
    assert train_network(**with_previews(options, tmp_path, sample_every_n_steps=3)) == 0
    (own_seed,), (derived,) = pictures(tmp_path), pictures(tmp_path, 1)
    assert re.fullmatch(r"net_000003_00_\d{14}_7\.png", own_seed.name)
    assert re.fullmatch(r"net_000003_01_\d{14}\.png", derived.name)
    texts = Image.open(own_seed).text
    assert {name: texts[name] for name in ("prompt", "negative-prompt", "seed", "sampler", "steps", "step")} == {
        "prompt": "a disc", "negative-prompt": "square", "seed": "7", "sampler": "euler_a", "steps": "3", "step": "3",
    }  # fmt: skip
    expected = (
        r"a disc <lora:net:1>\nNegative prompt: square\nSteps: 3, Sampler: Euler a, Schedule type: Uniform, "
        rf"CFG scale: 5, Seed: 7, Size: 64x64, Model hash: [0-9a-f]{{10}}, Model: {tiny_sd1_path.stem}, "
        r"RNG: CPU, Max embeddings multiples: 3, Version: Training scripts for Stable Diffusion"
    )
    assert re.fullmatch(expected, texts["parameters"])
    texts = Image.open(derived).text
    assert int(texts["seed"]) < 2**32 and texts["sampler"] == "euler"  # --sample_sampler


def test_no_file_is_named_that_will_never_be(options, tmp_path):
    assert train_network(**with_previews(options, tmp_path, "a --s 1", sample_every_n_steps=1)) == 0
    lines = {Image.open(path).text["parameters"].splitlines()[0] for path in pictures(tmp_path)}
    assert lines == {"a <lora:net:1>"}


def test_epochs_win_and_name_their_files(options, tmp_path):
    settings = {"sample_every_n_epochs": 1, "sample_every_n_steps": 1, "sample_at_first": True, "max_train_steps": 12}
    assert train_network(**with_previews(options, tmp_path, "a --s 1", **settings, save_every_n_epochs=1)) == 0
    paths = pictures(tmp_path)
    assert [path.name.split("_")[1] for path in paths] == ["e000000", "e000001", "e000002"]
    assert [Image.open(path).text["step"] for path in paths] == ["0", "6", "12"]
    lines = [Image.open(path).text["parameters"].splitlines()[0] for path in paths]
    assert lines == ["a", "a <lora:net-000001:1>", "a <lora:net:1>"]


def test_seeds_not_given_follow_from_the_run(options, tmp_path):
    settings = {"sample_every_n_steps": 1, "max_train_steps": 2}
    assert train_network(**with_previews(options, tmp_path, "a --s 1\na --s 1", **settings)) == 0
    seeds = [[Image.open(path).text["seed"] for path in pictures(tmp_path, index)] for index in (0, 1)]
    assert len(set(seeds[0])) == len(set(seeds[1])) == 1, "pictures of one prompt can be compared over time"
    assert seeds[0][0] != seeds[1][0]


def test_trackers_get_the_pictures(options, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = {"sample_every_n_steps": 2, "logging_dir": tmp_path / "log"}
    assert train_network(**with_previews(options, tmp_path, "a --s 1\nb --s 1", **settings)) == 0
    (events,) = [path for path in (tmp_path / "log").rglob("events.out.tfevents.*") if path.stat().st_size > 0]
    accumulator = EventAccumulator(str(events.parent))
    accumulator.Reload()
    assert sorted(accumulator.Tags()["images"]) == ["sample_0", "sample_1"]
    (event,) = accumulator.Images("sample_1")
    assert (event.step, event.width, event.height) == (2, 64, 64)


# ---------------------------------------------------------------------------------------------- failures


def test_pictures_that_do_not_fit_together_are_drawn_alone(options, tmp_path, monkeypatch):
    sizes = []
    draw = drawing.denoise

    def full(family, bundle, batch, **more):
        sizes.append(len(batch))
        if len(batch) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")
        return draw(family, bundle, batch, **more)

    monkeypatch.setattr(drawing, "denoise", full)
    assert train_network(**with_previews(options, tmp_path, "a --s 1\nb --s 1", sample_every_n_steps=3)) == 0
    assert sizes == [2, 1, 1]
    assert len(pictures(tmp_path)) == len(pictures(tmp_path, 1)) == 1


def test_failing_previews_do_not_stop_training(options, tmp_path, plain_run, monkeypatch, capfd):
    def full(*_given, **_more):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    monkeypatch.setattr(drawing, "denoise", full)
    settings = {"sample_every_n_steps": 3, "cache_latents": False}
    assert train_network(**with_previews(options, tmp_path, **settings)) == 0
    assert equal_files(plain_run, tmp_path / "drawn" / "net.safetensors")
    (said,) = [line for line in capfd.readouterr().err.splitlines() if "failed" in line]
    assert said == (
        "step 3: 2 of 2 previews failed, training goes on: the memory is full; smaller pictures "
        "(--w, --h in the file of prompts) need less"
    )


def test_a_folder_that_takes_no_pictures_does_not_stop_training(options, tmp_path, plain_run, capfd):
    (tmp_path / "drawn").mkdir()
    (tmp_path / "drawn" / "sample").touch()
    assert train_network(**with_previews(options, tmp_path, "a --s 1", sample_every_n_steps=2)) == 0
    assert equal_files(plain_run, tmp_path / "drawn" / "net.safetensors")
    assert "previews were not saved, training goes on" in capfd.readouterr().err


def test_a_round_is_broken_off_between_steps_when_the_run_is_stopped(options, tmp_path, monkeypatch, capfd):
    denoise, steps = drawing.denoise, []

    def stopped_at_the_second_step(*args, progress, **kwargs):
        def note(done, total):
            steps.append(done)
            if len(steps) == 2 + 3:  # after the 3 of the first picture
                os.kill(os.getpid(), signal.SIGINT)
            progress(done, total)

        return denoise(*args, progress=note, **kwargs)

    monkeypatch.setattr(drawing, "denoise", stopped_at_the_second_step)
    text = "a disc --s 3\nb --s 40\nc --s 40\n"
    assert train_network(**with_previews(options, tmp_path, text, sample_every_n_steps=1)) == 130
    assert steps == [1, 2, 3, 1, 2]
    assert len(pictures(tmp_path)) == 1 and not pictures(tmp_path, 1), "what was drawn by then is kept"
    assert "1 of 3 are drawn" in capfd.readouterr().err
    assert (tmp_path / "drawn" / "net-step00000001-state").is_dir()


def test_a_mistake_in_the_program_is_not_swallowed(options, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(drawing, "denoise", lambda *_given, **_more: 1 / 0)
    assert train_network(**with_previews(options, tmp_path, sample_every_n_steps=1)) == 1
    assert "ZeroDivisionError" in capfd.readouterr().err


def test_broken_prompts_are_one_sentence_before_torch_is_loaded(options, tmp_path):
    cases = [
        (with_previews(options, tmp_path, "a --w wide", sample_every_n_steps=1), "prompts.txt, line 1: --w 'wide'"),
        ({**options, "sample_prompts": "nowhere.txt", "sample_at_first": True}, "--sample_prompts: can't read nowhere"),
        ({**options, "sample_every_n_epochs": 1}, "--sample_every_n_epochs: nothing says what the previews show"),
    ]
    probe = (
        "import sys; sys.argv[0] = 'train_network.py'\n"
        "import train_network\nfrom library.cli.training import run\n"
        "print(run(train_network.SCRIPT), 'torch' in sys.modules)"
    )
    for changed, message in cases:
        done = subprocess.run(
            [sys.executable, "-c", probe, *flags(**changed)], cwd=ROOT, capture_output=True, text=True
        )
        assert done.stdout.split("\n")[-2] == "2 False", done.stderr
        assert message in done.stderr.strip().splitlines()[-1]


# ---------------------------------------------------------------------------------------------- processes


LATE_MAIN_PROCESS = """
import os, runpy, sys, time
sys.path.insert(0, {root!r})
from library.train.preview import Previews
draw = Previews.draw
def late(self, moment):
    time.sleep(2 if os.environ["RANK"] == "0" else 0)
    draw(self, moment)
Previews.draw = late
runpy.run_path({script!r}, run_name="__main__")
"""


def test_two_processes_share_the_prompts_out(options, tmp_path):
    text = "a --s 1\nb --s 1\nc --s 1"
    options |= {"max_train_steps": 1, "train_batch_size": 1}
    assert train_network(**with_previews({**options, "train_batch_size": 2}, tmp_path, text, sample_at_first=True)) == 0
    alone = [pixels(path) for index in range(3) for path in pictures(tmp_path, index)]
    two = tmp_path / "two"
    two.mkdir()
    script = two / "late.py"
    script.write_text(LATE_MAIN_PROCESS.format(root=str(ROOT), script=str(ROOT / "train_network.py")))
    shared = with_previews(options, two, text, sample_at_first=True, logging_dir=two / "log", log_with="tensorboard")
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
        "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
        script, *flags(**shared),
    ]  # fmt: skip
    environment = {**ENVIRONMENT, "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    together = [pixels(path) for index in range(3) for path in pictures(two, index)]
    assert len(alone) == len(together) == 3
    assert all(np.abs(one - other).mean() < 0.1 for one, other in zip(alone, together, strict=True))
    assert len(list((two / "drawn" / "sample").glob("net_prompt*.png"))) == 3

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = [path for path in (two / "log").rglob("events.out.tfevents.*") if path.stat().st_size > 0]
    accumulator = EventAccumulator(str(events.parent))
    accumulator.Reload()
    assert sorted(accumulator.Tags()["images"]) == ["sample_0", "sample_1", "sample_2"]
