"""NetworkTarget: from options to a trained network and its file."""

from __future__ import annotations

import json
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from library.checkpoints.weights import load_tensors
from library.families.base import ModelBundle, PictureSizes
from library.families.options import TextOptions
from library.options import OptionError
from library.targets.network import NetworkTarget, part_of
from library.targets.options import NetworkOptions
from tests.network_targets import FAMILY, load, ready, target
from tests.tiny_networks import perturb


@pytest.fixture
def bundle(tiny_sd1_path: Path) -> ModelBundle:
    return load(tiny_sd1_path)


def step(made: NetworkTarget, bundle: ModelBundle) -> torch.Tensor:
    """Gradients of one prediction, as the loop makes them; returns the loss."""
    torch.manual_seed(0)
    ids = FAMILY.tokenize(bundle.tokenizers, ["a cat"], 1).ids
    with torch.set_grad_enabled(made.trains_text(0)):
        text = FAMILY.encode_text(bundle.text_encoders, ids, made.text)
        conditioning = FAMILY.condition(text, PictureSizes.whole(128, 128, 1, torch.device("cpu")))
    latents = torch.randn(1, 4, 16, 16)
    loss = FAMILY.predict(bundle.unet, latents, torch.tensor([500]), conditioning).square().mean()
    loss.backward()
    return loss.detach()


# ---------------------------------------------------------------------------------------------- what is trained


def test_both_parts(bundle):
    made, groups = ready(bundle, text_encoder_lr=1e-5)
    assert groups == {"text encoder": (24, 1e-5), "unet": (384, 1e-3)}
    assert made.trains_text(0)
    assert {part.name: part.modules for part in made.parts()} == {"text encoder": 12, "unet": 192}
    assert sum(part.parameters for part in made.parts()) == sum(p.numel() for p in made.trained_module().parameters())
    assert {parameter.dtype for parameter in made.trained_module().parameters()} == {torch.float32}
    step(made, bundle)
    assert all(parameter.grad is not None for parameter in made.trained_module().parameters())
    frozen = [p for part in (bundle.unet, *bundle.text_encoders) for p in part.parameters()]
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in frozen)


@pytest.mark.parametrize(
    ("options", "names", "trains_text"),
    [
        ({"network_train_unet_only": True}, {"unet"}, False),
        ({"network_train_text_encoder_only": True}, {"text encoder"}, True),
        ({"text_encoder_lr": 0.0}, {"unet"}, False),
        ({"unet_lr": 0.0}, {"text encoder"}, True),
    ],
)
def test_one_part(bundle, options, names, trains_text):
    """A part with a rate of 0 stays in the file, but takes no gradients."""
    made, groups = ready(bundle, **options)
    assert set(groups) == names
    assert made.trains_text(0) is trains_text
    step(made, bundle)
    for name, parameter in made.trained_module().named_parameters():
        assert (parameter.grad is not None) == (part_of(name) in names)
    left_out = any(key.startswith("network_train") for key in options)
    assert len(made.parts()) == (1 if left_out else 2)


def test_blocks_have_names(bundle):
    _, groups = ready(
        bundle, network_args=("mid_lr_weight=0.5", "loraplus_unet_lr_ratio=2"), network_train_unet_only=True
    )
    assert groups["unet block 12"] == (12, 5e-4)
    assert groups["unet block 12 plus"] == (12, 1e-3)
    assert "unet block 7" in groups


@pytest.mark.parametrize(("clip_skip", "tensors"), [(None, 24), (1, 24), (2, 12)])
def test_layers_that_clip_skip_leaves_out_are_frozen(bundle, clip_skip, tensors):
    """No gradient can reach them: data parallelism would wait for it for ever."""
    made, groups = ready(bundle, TextOptions(clip_skip=clip_skip))
    assert groups["text encoder"][0] == tensors
    step(made, bundle)
    assert all((p.grad is not None) == p.requires_grad for p in made.trained_module().parameters())
    assert len(made.trained_module().text_adapters) == 12


def test_gradient_checkpointing_changes_no_gradient(tiny_sd1_path):
    gradients = []
    for checkpointing in (False, True):
        bundle = load(tiny_sd1_path)
        made = target()
        made.setup(FAMILY, bundle, gradient_checkpointing=checkpointing)
        made.param_groups(1e-3)
        perturb(made.trained_module())
        if checkpointing:
            bundle.unet.enable_gradient_checkpointing()
            bundle.text_encoders[0].gradient_checkpointing_enable()
            bundle.unet.train()
        step(made, bundle)
        gradients.append([parameter.grad for parameter in made.trained_module().parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


# ---------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"network_module": "networks.lorra"}, "--network_module: there is no Python module"),
        ({"network_args": ("conv_dims=4",)}, "--network_args conv_dims: unknown name; did you mean conv_dim"),
        ({"network_args": ("unet=4",)}, "--network_args unet: is set by the program"),
    ],
)
def test_refused_before_a_model_is_loaded(options, message):
    with pytest.raises(OptionError, match=message):
        target(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"network_weights": "missing.safetensors"}, "--network_weights: missing.safetensors does not exist"),
        ({"base_weights": ("missing.pt",)}, "--base_weights: missing.pt does not exist"),
    ],
)
def test_missing_files_are_refused_before_torch_is_loaded(options, message):
    with pytest.raises(OptionError, match=message):
        NetworkOptions("networks.lora", **options).check_before_start()


@pytest.mark.parametrize(("files", "words"), [(("a",), ["0.5 0.25", "names 1 files"]), (None, ["1 0.5", "0 files"])])
def test_multipliers_of_no_file_are_said(files, words):
    (note,) = NetworkOptions("networks.lora", base_weights=files, base_weights_multiplier=(1, 0.5, 0.25)).notes()
    assert note.startswith("--base_weights_multiplier: ") and all(word in note for word in words)
    assert not NetworkOptions("networks.lora", base_weights=("a", "b"), base_weights_multiplier=(1,)).notes()


def test_description():
    plain = target(network_alpha=1, network_dropout=None)
    assert plain.describe() == {
        "ss_network_module": "networks.lora",
        "ss_network_dim": None,
        "ss_network_alpha": 1,
        "ss_network_dropout": None,
    }
    described = target(network_dropout=0.1, network_args=("conv_dim=4", "conv_alpha=2")).describe()
    assert json.loads(described["ss_network_args"]) == {"conv_dim": "4", "conv_alpha": "2", "dropout": 0.1}


# ---------------------------------------------------------------------------------------------- norm limit


def test_norm_limit(bundle):
    made, _ = ready(bundle, scale_weight_norms=0.01)
    perturb(made.trained_module())
    logged = {name: float(value) for name, value in made.after_optimizer_step().items()}
    assert logged["max_norm/keys_scaled"] > 0
    assert logged["max_norm/max_key_norm"] == pytest.approx(0.01, rel=1e-4)
    assert logged["max_norm/average_key_norm"] <= logged["max_norm/max_key_norm"]
    unlimited, _ = ready(bundle)
    assert unlimited.after_optimizer_step() == {}


# ---------------------------------------------------------------------------------------------- other people's networks

FOREIGN = """
    import torch

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = torch.nn.Parameter(torch.ones(1, dtype=torch.float16))
            self.seen = []

        def apply_to(self, text_encoder, unet, text, image):
            base = unet.conv_out.forward
            unet.conv_out.forward = lambda x: base(x) * self.gain

        def prepare_optimizer_params(self, text_encoder_lr, unet_lr):
            return [{"params": self.parameters(), "lr": unet_lr or 0.5}]

        def prepare_grad_etc(self, text_encoder, unet):
            self.requires_grad_(True)

        def on_epoch_start(self, text_encoder, unet):
            self.seen.append("epoch")

        def save_weights(self, file, dtype, metadata):
            torch.save(self.state_dict(), file)

    def create_network(multiplier, network_dim, network_alpha, vae, text_encoder, unet, **kwargs):
        return Network()
"""


@pytest.fixture
def foreign(tmp_path, monkeypatch) -> str:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "foreign_network.py").write_text(textwrap.dedent(FOREIGN))
    return "foreign_network"


def test_a_foreign_network_trains_and_saves(tmp_path, bundle, foreign, caplog):
    made, groups = ready(bundle, network_module=foreign, scale_weight_norms=1.0)
    assert groups == {"group 1": (1, 0.5)}
    assert made.needs_autocast and not target().needs_autocast
    assert made.trains_text(0)  # its names do not say what it trains
    assert "--scale_weight_norms is off: foreign_network" in caplog.text
    assert made.after_optimizer_step() == {}
    made.on_epoch_start(1)
    made.on_step_start(0)
    assert made.trained_module().seen == ["epoch"]
    step(made, bundle)
    assert next(made.trained_module().parameters()).grad is not None
    made.save(tmp_path / "foreign.pt", dtype=None, metadata={})
    assert list(load_tensors(tmp_path / "foreign.pt")) == ["gain"]


def test_what_a_foreign_network_lacks_is_named(bundle, foreign):
    with pytest.raises(OptionError, match="foreign_network has no function create_network_from_weights"):
        target(network_module=foreign, base_weights=("x.safetensors",))
    made = target(network_module=foreign)
    with pytest.raises(OptionError, match="foreign_network has no method enable_gradient_checkpointing"):
        made.setup(FAMILY, bundle, gradient_checkpointing=True)


def test_part_of():
    assert part_of("lora_te_text_model_encoder_layers_0_mlp_fc1.alpha") == "text encoder"
    assert part_of("lora_te2_text_model_encoder_layers_0_mlp_fc1") == "text encoder"
    assert part_of("lycoris_unet_down_blocks_0") == "unet"
    assert part_of("gain") is None


def test_options_stay_what_they_were():
    options = NetworkOptions(network_module="networks.lora", network_args=("conv_dim=4",))
    copy = replace(options)
    NetworkTarget(options).describe()
    assert options == copy
