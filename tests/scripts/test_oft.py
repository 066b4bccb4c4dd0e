"""networks.oft from training to a picture, and files of other kinds in pictures and under a training."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.runs import equal_files, metadata_of, train_network
from tests.scripts.conftest import short_run
from tests.scripts.test_own_networks import SCRIPTS, drawn

ARGUMENTS = {"sd1": [], "sdxl": ["enable_conv=true", "enable_all_linear=true"]}


@pytest.mark.parametrize("kind", SCRIPTS)
def test_trains_resumes_and_draws(tmp_path, images, request, capfd, kind):
    train, generator = SCRIPTS[kind]
    model = request.getfixturevalue(f"tiny_{kind}_path")
    options = short_run(tmp_path, images, model) | {
        "network_module": "networks.oft", "network_args": ARGUMENTS[kind], "network_alpha": 0.01,
        "gradient_checkpointing": True, "max_train_steps": 4, "learning_rate": 1e-2,
    }  # fmt: skip
    assert train(**options, save_every_n_steps=2, save_state=True) == 0
    assert "networks.oft, 4 blocks per layer, constraint 0.01\n" in capfd.readouterr().err
    file, early = tmp_path / "out" / "net.safetensors", tmp_path / "out" / "net-step00000002.safetensors"
    assert metadata_of(file)["ss_network_module"] == "networks.oft"
    before, after = load_file(early), load_file(file)
    blocks = [key for key in after if key.endswith(".oft_blocks")]
    moved = sum(not before[key].equal(after[key]) for key in blocks)  # attention among a single pixel moves nothing
    assert len(after) == 2 * len(blocks) and moved > 0.8 * len(blocks)
    assert any("in_layers_2" in key for key in blocks) == (kind == "sdxl")

    again = {**options, "output_dir": tmp_path / "again"}
    assert train(**again, resume=tmp_path / "out" / "net-step00000002-state") == 0
    assert equal_files(file, tmp_path / "again" / "net.safetensors")

    strong = ["--network_module", "networks.oft", "--network_weights", file, "--network_mul", 4]
    plain = drawn(generator, model, tmp_path / "plain")
    applied = drawn(generator, model, tmp_path / "applied", *strong)
    assert np.abs(applied - plain).mean() > 1
    for way in ("--network_merge", "--network_pre_calc"):
        assert np.abs(drawn(generator, model, tmp_path / way, *strong, way) - applied).max() <= 1


MISTAKES = {
    "blocks": ({"network_dim": 5}, "--network_dim: 5 blocks don't divide the 32 outputs of oft_unet_"),
    "switch": ({"network_args": ["enable_conv=maybe"]}, "--network_args enable_conv: 'maybe' is neither true nor"),
    "text encoders alone": ({"network_train_text_encoder_only": True}, "--network_module: networks.oft has nothing"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_sentence(options, capfd, name):
    settings, sentence = MISTAKES[name]
    assert train_network(**{**options, "network_module": "networks.oft", "network_alpha": 0.01, **settings}) == 2
    said = capfd.readouterr().err
    assert sentence in said.splitlines()[-1]


@pytest.fixture(scope="module")
def loha(tmp_path_factory):
    """A file of LoHa, written by hand, of two layers of the tiny SD 1.x model."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, outputs, inputs in (
        ("lora_unet_conv_in", 32, 4 * 9),
        ("lora_te_text_model_encoder_layers_0_mlp_fc1", 128, 64),
    ):
        for part, shape in (("a", (outputs, 4)), ("b", (4, inputs))):
            for side in (1, 2):
                tensors[f"{name}.hada_w{side}_{part}"] = torch.randn(shape, generator=generator) * 0.4
        tensors[f"{name}.alpha"] = torch.tensor(4.0)
    file = tmp_path_factory.mktemp("loha") / "loha.safetensors"
    save_file(tensors, file)
    return file


def test_a_file_of_another_kind_in_pictures(loha, tiny_sd1_path, tmp_path):
    generator = SCRIPTS["sd1"][1]
    network = ["--network_module", "networks.lora", "--network_weights", loha]
    plain = drawn(generator, tiny_sd1_path, tmp_path / "plain")
    applied = drawn(generator, tiny_sd1_path, tmp_path / "applied", *network)
    assert np.abs(applied - plain).mean() > 1
    for way in ("--network_merge", "--network_pre_calc"):
        assert np.abs(drawn(generator, tiny_sd1_path, tmp_path / way, *network, way) - applied).max() <= 1


def test_a_file_of_another_kind_under_a_training(loha, options, capfd, tmp_path):
    """It can be what is merged before, but not what is trained on."""
    run = {**options, "max_train_steps": 1}
    assert train_network(**run) == 0
    assert train_network(**run | {"output_dir": tmp_path / "based"}, base_weights=[loha]) == 0
    assert f"merged {loha}" in capfd.readouterr().err
    assert not equal_files(tmp_path / "out" / "net.safetensors", tmp_path / "based" / "net.safetensors")
    assert train_network(**run, network_weights=loha, dim_from_weights=True) == 2
    said = capfd.readouterr().err.splitlines()[-1]
    assert (
        f"--network_weights: {loha} holds LoHa, which networks.lora draws with and merges, but does not train" in said
    )
