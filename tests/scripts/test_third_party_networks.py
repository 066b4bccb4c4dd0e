"""Both scripts with other people's network modules: LyCORIS, and one that has only what is required."""

from __future__ import annotations

import re
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from library.cli import generation
from library.targets.adapter import Adapted
from tests.runs import equal_files, metadata_of, train_network

LYCORIS = {"network_module": "lycoris.kohya", "network_dim": 4, "network_alpha": 2, "max_train_steps": 2}
FACTORS = {"loha": "hada_w1_a", "lokr": "lokr_w1", "locon": "lora_up.weight"}
# the trade's names of SD 1.x / 2.x layers, as its web UIs look for them
TRADE_NAME = re.compile(
    r"lora_te_text_model_encoder_layers_\d+_(self_attn_(q|k|v|out)_proj|mlp_fc[12])"
    r"|lora_unet_(conv_in|conv_out|time_embedding_linear_[12]|(down|up)_blocks_\d_\w+|mid_block_\w+)"
)


@pytest.mark.parametrize("algorithm", FACTORS)
def test_lycoris_trains_with_its_default_preset(options, tmp_path, algorithm, tiny_sd1_path):
    options |= LYCORIS | {"network_args": [f"algo={algorithm}", "conv_dim=2"], "save_every_n_steps": 1}
    assert train_network(**options) == 0
    file = tmp_path / "out" / "net.safetensors"
    tensors = load_file(file)
    layers = {name.partition(".")[0] for name in tensors}
    assert all(TRADE_NAME.fullmatch(layer) for layer in layers)
    assert {"lora_unet_time_embedding_linear_1", "lora_unet_conv_in"} <= layers
    assert any(name.endswith(FACTORS[algorithm]) for name in tensors)
    assert (
        f"lora_unet_time_embedding_linear_1.{'lora_down.weight' if algorithm == 'locon' else FACTORS[algorithm]}"
        in tensors
    )
    assert metadata_of(file)["ss_network_module"] == "lycoris.kohya"
    first = load_file(tmp_path / "out" / "net-step00000001.safetensors")
    parts = {name.split("_")[1] for name in tensors if not torch.equal(first[name], tensors[name])}
    assert parts == {"te", "unet"}, "both parts learn"
    if algorithm == "lokr":
        return  # LyCORIS 4.1.3 can't read back its own factors of conv_in, 4 channels in two parts
    assert drawn(tiny_sd1_path, tmp_path / "without") != drawn(tiny_sd1_path, tmp_path / "with", file)


def drawn(model: Path, folder: Path, network: Path | None = None) -> bytes:
    words = ["--ckpt", model, "--outdir", folder, "--W", 64, "--H", 64, "--steps", 2, "--prompt", "a cat --d 1"]
    words += ["--network_module", "lycoris.kohya", "--network_weights", network] if network else []
    from gen_img_diffusers import SCRIPT

    assert generation.run(SCRIPT, [str(word) for word in words]) == 0
    (picture,) = folder.glob("*.png")
    return np.asarray(Image.open(picture)).tobytes()


def test_lycoris_resumes_and_goes_on_from_its_files(options, tmp_path):
    options |= LYCORIS | {"network_args": ["algo=loha"], "gradient_checkpointing": True, "max_train_steps": 4}
    assert train_network(**options, save_every_n_steps=2, save_state=True) == 0
    again = {**options, "output_dir": tmp_path / "again"}
    assert train_network(**again, resume=tmp_path / "out" / "net-step00000002-state") == 0
    assert equal_files(tmp_path / "out" / "net.safetensors", tmp_path / "again" / "net.safetensors")
    file = tmp_path / "out" / "net.safetensors"
    onward = {**options, "output_dir": tmp_path / "onward", "max_train_steps": 1, "learning_rate": 0.0}
    assert train_network(**onward, network_weights=file, unet_lr=1e-12) == 0
    before, after = load_file(file), load_file(tmp_path / "onward" / "net.safetensors")
    assert all(torch.allclose(before[name], after[name], atol=1e-8) for name in before)


@pytest.mark.parametrize("arguments", [["algo=full"], ["algo=dylora", "block_size=2"]])
def test_lycoris_forms_whose_files_are_not_their_parameters_resume(options, tmp_path, arguments):
    options |= LYCORIS | {"network_args": arguments, "max_train_steps": 3, "network_train_unet_only": True}
    assert train_network(**options, save_every_n_steps=1, save_state=True) == 0
    again = {**options, "output_dir": tmp_path / "again"}
    assert train_network(**again, resume=tmp_path / "out" / "net-step00000001-state") == 0
    assert equal_files(tmp_path / "out" / "net.safetensors", tmp_path / "again" / "net.safetensors")


REQUIRED_ONLY = """
    import torch
    from safetensors.torch import save_file


    class Network(torch.nn.Module):
        '''A learned shift of the U-Net's output: everything the trainers ask for and nothing else.'''

        def __init__(self, unet):
            super().__init__()
            self.shift = torch.nn.Parameter(torch.zeros(unet.config.out_channels, 1, 1))

        def apply_to(self, text_encoder, unet, apply_text_encoder=True, apply_unet=True):
            unet.conv_out.register_forward_hook(lambda module, inputs, output: output + self.shift.to(output.dtype))

        def prepare_optimizer_params(self, text_encoder_lr, unet_lr):
            return [{"params": [self.shift], **({"lr": unet_lr} if unet_lr else {})}]

        def prepare_grad_etc(self, text_encoder, unet):
            self.requires_grad_(True)

        def on_epoch_start(self, text_encoder, unet):
            self.train()

        def save_weights(self, file, dtype, metadata):
            save_file({"lora_unet_conv_out.shift": self.shift.detach()}, file, metadata)


    def create_network(multiplier, network_dim, network_alpha, vae, text_encoder, unet, **kwargs):
        return Network(unet)
"""


@pytest.fixture
def written_module(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)

    def write(name: str, source: str) -> str:
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(source), encoding="utf-8")
        sys.modules.pop(name, None)
        return name

    return write


def test_a_module_with_only_what_is_required(options, tmp_path, written_module):
    name = written_module("shift_network", REQUIRED_ONLY)
    assert train_network(**options | {"network_module": name, "network_dim": None}) == 0
    (shift,) = load_file(tmp_path / "out" / "net.safetensors").values()
    assert bool((shift != 0).all())


@pytest.mark.parametrize("method", Adapted.REQUIRED)
def test_a_module_that_lacks_a_method_is_refused_by_name(options, written_module, capsys, method):
    name = written_module(f"without_{method}", REQUIRED_ONLY.replace(f"def {method}(", "def something_else("))
    assert train_network(**options | {"network_module": name, "network_dim": None}) == 2
    sentence = f"--network_module: the network of {name} has no method {method}, which this run needs"
    assert sentence in capsys.readouterr().err.splitlines()[-1]


def test_a_module_that_lacks_the_function_is_refused_before_the_model_is_read(options, written_module, capsys):
    name = written_module("without_function", REQUIRED_ONLY.replace("def create_network(", "def something_else("))
    assert train_network(**options | {"network_module": name}) == 2
    said = capsys.readouterr().err
    sentence = f"--network_module: {name} has no function create_network, which this run needs"
    assert sentence in said.splitlines()[-1] and "base model" not in said
