"""The relatives of networks.lora from training to a picture: both scripts, states, and files used as LoRA."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

import gen_img_diffusers
import sdxl_gen_img
from library.cli import generation
from tests.runs import equal_files, in_two_processes, metadata_of, sdxl_train_network, train_network
from tests.scripts.conftest import short_run

MODULES = {
    "networks.lora_fa": ["conv_dim=2", "module_dropout=0.2"],
    "networks.dylora": ["conv_dim=4", "unit=2", "loraplus_lr_ratio=4"],
}
SCRIPTS = {"sd1": (train_network, gen_img_diffusers), "sdxl": (sdxl_train_network, sdxl_gen_img)}


def settings_of(module: str, folder: Path, images: Path, model: Path) -> dict[str, object]:
    run = short_run(folder, images, model)
    return run | {"network_module": module, "network_args": MODULES[module], "gradient_checkpointing": True}


def drawn(script, model: Path, folder: Path, *network: object) -> np.ndarray:
    words = [
        "--ckpt",
        model,
        "--outdir",
        folder,
        "--W",
        64,
        "--H",
        64,
        "--steps",
        2,
        "--prompt",
        "a cat --d 1",
        *network,
    ]
    assert generation.run(script.SCRIPT, [str(word) for word in words]) == 0
    (picture,) = folder.glob("*.png")
    return np.asarray(Image.open(picture)).astype(int)


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("kind", SCRIPTS)
def test_trains_resumes_and_draws(tmp_path, images, request, kind, module):
    train, generator = SCRIPTS[kind]
    model = request.getfixturevalue(f"tiny_{kind}_path")
    options = settings_of(module, tmp_path, images, model) | {"max_train_steps": 4, "learning_rate": 1e-2}
    assert train(**options, save_every_n_steps=2, save_state=True) == 0
    file, early = tmp_path / "out" / "net.safetensors", tmp_path / "out" / "net-step00000002.safetensors"
    assert metadata_of(file)["ss_network_module"] == module
    before, after = load_file(early), load_file(file)
    moved = {key.rpartition(".lora_")[2] for key in after if "lora_" in key and not before[key].equal(after[key])}
    parts = {key.split("_")[1] for key in after if not before[key].equal(after[key])}
    assert {"alpha"}.isdisjoint(moved) and parts >= {"unet", "te" if kind == "sd1" else "te1"}
    up, down = (any(word in name for name in moved) for word in ("up.weight", "down.weight"))
    assert up and down == (module == "networks.dylora")

    again = {**options, "output_dir": tmp_path / "again"}
    assert train(**again, resume=tmp_path / "out" / "net-step00000002-state") == 0
    assert equal_files(file, tmp_path / "again" / "net.safetensors")

    strong = ["--network_weights", file, "--network_mul", 8]
    plain = drawn(generator, model, tmp_path / "plain")
    own = drawn(generator, model, tmp_path / "own", "--network_module", module, *strong)
    as_lora = drawn(generator, model, tmp_path / "as_lora", "--network_module", "networks.lora", *strong)
    merged = drawn(generator, model, tmp_path / "merged", "--network_module", module, *strong, "--network_merge")
    assert np.array_equal(own, as_lora)
    assert np.abs(own - plain).mean() > 1
    assert np.abs(own - merged).max() <= 1


def test_ranks_of_a_file_train_on(tmp_path, images, tiny_sd1_path):
    """A LoRA's file goes on as DyLoRA, under its ranks; a unit that does not divide them is refused."""
    options = short_run(tmp_path, images, tiny_sd1_path) | {"max_train_steps": 1}
    assert train_network(**options) == 0
    file = tmp_path / "out" / "net.safetensors"
    options |= {"network_module": "networks.dylora", "network_dim": None, "output_dir": tmp_path / "on"}
    onward = {**options, "network_weights": file, "dim_from_weights": True, "network_args": ["unit=2"]}
    assert train_network(**onward) == 0
    before, after = load_file(file), load_file(tmp_path / "on" / "net.safetensors")
    assert before.keys() == after.keys() and any(not before[key].equal(after[key]) for key in before)
    assert train_network(**{**onward, "network_args": ["unit=3"], "output_dir": tmp_path / "not"}) == 2
    assert not (tmp_path / "not").exists() or not list((tmp_path / "not").glob("*.safetensors"))


def test_two_processes_draw_different_ranks(tmp_path, images, tiny_sd1_path):
    """Whichever process has drawn a rank, both have it afterwards: the state goes on, and ends in the same weights."""
    options = settings_of("networks.dylora", tmp_path, images, tiny_sd1_path) | {"max_train_steps": 2}
    in_two_processes("train_network.py", **options)
    tensors = load_file(tmp_path / "out" / "net.safetensors")
    ups = [tensor for key, tensor in tensors.items() if key.startswith("lora_unet") and key.endswith("up.weight")]
    learned = [int((tensor != 0).flatten(1).any(0).sum()) for tensor in ups]
    # 2 steps x 2 processes draw one half of the ranks each: in most modules both halves have learned
    assert set(learned) <= {0, 2, 4} and np.mean([count == 4 for count in learned]) > 0.6


@pytest.mark.parametrize(
    ("module", "sentence"),
    [
        ("networks.lora_fa", "the down projections are frozen, only the up projections learn"),
        ("networks.dylora", "each step draws the ranks that learn in each module: 2 of 4"),
    ],
)
def test_the_plan_says_what_learns(tmp_path, images, tiny_sd1_path, capfd, module, sentence):
    options = settings_of(module, tmp_path, images, tiny_sd1_path)
    assert train_network(**options, plan=True) == 0
    said = capfd.readouterr()
    text = said.out + said.err
    assert sentence in text
    assert ("the network's frozen weights" in text) == (module == "networks.lora_fa")


MISTAKES = {
    "unit": ("networks.dylora", {"network_args": ["unit=3"]}, "--network_args unit: 3 does not divide the rank 4"),
    "rank of convolutions": (
        "networks.dylora", {"network_args": ["conv_dim=8"]}, "conv_dim: 8 is not --network_dim 4",
    ),
    "LoRA+": ("networks.lora_fa", {"network_args": ["loraplus_lr_ratio=16"]}, "only one projection learns"),
    "name": ("networks.dylor", {}, "did you mean networks.dylora?"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_sentence(options, capfd, name):
    module, settings, sentence = MISTAKES[name]
    assert train_network(**{**options, "network_module": module, **settings}) == 2
    said = capfd.readouterr().err
    assert sentence in said.splitlines()[-1] and "base model" not in said
