"""What every network module of this project must do. A new module adds rows to CASES, and its keys to the golden file.

What modules may do differently is said in `Module`; whatever is not said there holds for all of them.

The golden file tests/data/network_keys.json is written anew by `python -m tests.contracts.test_network_modules`.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from library.checkpoints.safetensors_io import read_header
from library.checkpoints.weights import load_tensors
from library.options import OptionError
from library.targets.adapter import Adapted, Models, NetworkFactory
from tests.tiny_networks import outputs, perturb, tiny_parts

GOLDEN = Path(__file__).parents[1] / "data" / "network_keys.json"


@dataclass(frozen=True)
class Module:
    """A network module, how these tests create its networks, and what it may do differently from LoRA."""

    name: str
    dim: int = 4
    alpha: float = 2.0
    limits_norms: bool = True  # False: has no --scale_weight_norms
    skips_parameters: bool = False  # True: a training step leaves out some of what is trained, by chance
    training_arguments: tuple[str, ...] = ()  # arguments that files don't tell, given again with --dim_from_weights


LORA = Module("networks.lora")
LORA_FA = Module("networks.lora_fa")
OFT = Module("networks.oft", alpha=1e-3, limits_norms=False)


@dataclass(frozen=True)
class Case:
    """One way to use a module."""

    module: Module
    kind: str = "sd1"
    arguments: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return " ".join([self.module.name, self.kind, *(f"{key}={value}" for key, value in self.arguments.items())])


CASES = [
    Case(LORA),
    Case(LORA, "sd2"),
    Case(LORA, arguments={"conv_dim": "2", "conv_alpha": "1"}),
    Case(LORA, arguments={"block_dims": ",".join(["0"] * 12 + ["2"] * 13)}),
    Case(LORA, "sdxl", {"conv_dim": "2", "conv_alpha": "1"}),
    Case(LORA, "sdxl", {"block_dims": ",".join(["0"] * 10 + ["2"] * 13)}),
    Case(LORA_FA),
    Case(LORA_FA, "sd2"),
    Case(LORA_FA, "sdxl", {"conv_dim": "2", "conv_alpha": "1"}),
    Case(OFT),
    Case(OFT, "sd2", {"enable_all_linear": "true"}),
    Case(OFT, "sdxl", {"enable_conv": "true"}),
]


def each(cases: list[Case]) -> Any:
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


each_case = each(CASES)
each_that_limits_norms = each([case for case in CASES if case.module.limits_norms])


def models(case: Case) -> Models:
    text_encoder, unet = tiny_parts(case.kind)
    encoders = tuple(text_encoder) if isinstance(text_encoder, list) else (text_encoder,)
    return Models(encoders, unet, torch.nn.Identity())


def parts_of(on: Models) -> tuple[torch.nn.Module, ...]:
    return (*on.text_encoders, on.unet)


def created(case: Case, on: Models, *, trained: bool = True) -> Adapted:
    """A network on a model, hooked, in evaluation mode; with weights as after training if `trained`."""
    module = case.module
    network = NetworkFactory(module.name).create(module.dim, module.alpha, None, on, **case.arguments)
    network.apply(on, text=True, unet=True)
    network.prepare_gradients(on)
    network.network.eval()
    if trained:
        perturb(network.network)
    return network


@torch.no_grad()
def pictures(on: Models) -> torch.Tensor:
    """Text states and U-Net output in one row."""
    return torch.cat([part.flatten() for part in outputs(on.text_encoder, on.unet)])


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, atol=5e-5, rtol=1e-4)


@each_case
def test_has_the_whole_contract(case):
    network = created(case, models(case))
    network.require(*Adapted.REQUIRED, "load_weights", "merge_to", "enable_gradient_checkpointing")
    network.require("backup_weights", "restore_weights", "pre_calculation", "set_multiplier", "get_trainable_params")
    assert network.can_limit_norms == case.module.limits_norms
    assert network.network.is_mergeable()
    assert NetworkFactory(case.module.name).casts_itself


@each_case
def test_starts_as_no_change(case):
    plain = pictures(models(case))
    on = models(case)
    created(case, on, trained=False)
    assert torch.equal(pictures(on), plain)


@each_case
def test_changes_the_model_and_only_through_its_hooks(case):
    on = models(case)
    before = [{key: value.clone() for key, value in part.state_dict().items()} for part in parts_of(on)]
    plain = pictures(on)
    created(case, on)
    assert not close(pictures(on), plain)
    for part, weights in zip(parts_of(on), before, strict=True):
        assert all(torch.equal(value, weights[key]) for key, value in part.state_dict().items())


@each_case
def test_only_its_own_gradients(case):
    on = models(case)
    network = created(case, on)
    outputs(on.text_encoder, on.unet)[1].square().mean().backward()
    assert all(parameter.grad is None for part in parts_of(on) for parameter in part.parameters())
    assert all(p.grad is not None for p in network.network.parameters() if p.requires_grad)
    assert {id(p) for p in network.network.get_trainable_params()} == {
        id(p) for p in network.network.parameters() if p.requires_grad
    }


@each_case
def test_a_training_step_reaches_every_module(case):
    """In training mode some of what is trained may be left out, but nothing else learns and no module stays behind."""
    on = models(case)
    network = created(case, on)
    network.on_epoch_start(on)
    assert network.network.training
    outputs(on.text_encoder, on.unet)[1].square().mean().backward()
    assert all(parameter.grad is None for part in parts_of(on) for parameter in part.parameters())
    for adapter in network.network.adapters:
        trained = [parameter for parameter in adapter.parameters() if parameter.requires_grad]
        learning = [parameter for parameter in trained if parameter.grad is not None]
        assert learning and (case.module.skips_parameters or len(learning) == len(trained)), adapter.name
    assert all(p.grad is None for p in network.network.parameters() if not p.requires_grad)


@each_case
def test_gradients_point_downhill(case):
    """A small step against the gradient lowers the loss as much as the gradient says."""
    on = models(case)
    network = created(case, on)
    parameters = [parameter for parameter in network.network.parameters() if parameter.requires_grad]
    before = outputs(on.text_encoder, on.unet)[1].square().mean()
    gradients = torch.autograd.grad(before, parameters)
    step = 1e-3 / sum(gradient.square().sum() for gradient in gradients)
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter -= step * gradient
        after = outputs(on.text_encoder, on.unet)[1].square().mean()
    assert (before - after).item() == pytest.approx(1e-3, rel=0.2)


@each_case
def test_optimizer_groups_hold_each_parameter_once(case):
    network = created(case, models(case))
    for groups in (network.param_groups(1e-5, 1e-4, 1e-3), network.param_groups(None, None, 1e-3)):
        listed = [id(parameter) for _, group in groups for parameter in group["params"]]
        assert sorted(listed) == sorted(id(parameter) for parameter in network.network.get_trainable_params())
        assert all(group["lr"] > 0 for _, group in groups)


@each_case
@pytest.mark.parametrize("multiplier", [1.0, 0.4, -0.5])
def test_merged_equals_applied(case, multiplier):
    on = models(case)
    network = created(case, on)
    network.network.set_multiplier(multiplier)
    applied = pictures(on)
    tensors = network.network.state_dict()
    merged = models(case)
    factory = NetworkFactory(case.module.name)
    fresh, _ = factory.create_from_weights(multiplier, "file", merged, weights_sd=tensors, for_inference=True)
    fresh.merge(merged, tensors, torch.float32, torch.device("cpu"))
    assert close(pictures(merged), applied)


@each_case
def test_multiplier_zero_is_off(case):
    plain = pictures(models(case))
    on = models(case)
    network = created(case, on)
    network.network.set_multiplier(0.0)
    assert torch.equal(pictures(on), plain)


@each_case
def test_pre_calculation_and_back(case):
    plain_weights = [value.clone() for value in models(case).unet.state_dict().values()]
    on = models(case)
    network = created(case, on).network
    applied = pictures(on)
    network.backup_weights()
    network.pre_calculation()
    assert close(pictures(on), applied)
    network.restore_weights()
    assert all(torch.equal(a, b) for a, b in zip(on.unet.state_dict().values(), plain_weights, strict=True))
    assert torch.equal(pictures(on), applied)


@each_case
def test_regional(case):
    """A network with the whole picture is the plain network; with half of it another one; afterwards the plain one."""
    on = models(case)
    network = created(case, on).network
    for adapter in network.text_adapters:
        adapter.multiplier = 0.0  # a batch as large as that of the pictures is taken for negative prompts
    plain = pictures(on)
    whole = torch.ones(128, 128)
    half = whole * (torch.arange(128) < 64)
    results = []
    for mask in (whole, half):
        network.set_region(0, True, mask)
        network.set_current_generation(2, 1, 128, 128, {})
        results.append(pictures(on))
    assert close(results[0], plain) and not close(results[1], plain)
    network.leave_region()
    assert torch.equal(pictures(on), plain)


@each_case
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_file_round_trip(case, suffix, tmp_path):
    on = models(case)
    network = created(case, on)
    file = tmp_path / f"network.{suffix}"
    network.save(file, None, {"ss_network_dim": "4"})
    if suffix == "safetensors":
        metadata = read_header(file).metadata
        assert metadata["ss_network_dim"] == "4" and "sshs_model_hash" in metadata and "sshs_legacy_hash" in metadata
    other = models(case)
    loaded, tensors = NetworkFactory(case.module.name).create_from_weights(1.0, str(file), other, for_inference=True)
    loaded.apply(other, text=True, unet=True)
    assert loaded.load(str(file), tensors) == len(tensors)
    ours = network.network.state_dict()
    assert list(ours) == list(loaded.network.state_dict())
    assert all(torch.equal(value, ours[key]) for key, value in loaded.network.state_dict().items())
    assert torch.equal(pictures(other), pictures(on))


@each_case
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_files_in_half_precision(case, dtype, tmp_path):
    on = models(case)
    network = created(case, on)
    network.save(tmp_path / "half.safetensors", dtype, {})
    tensors = load_tensors(tmp_path / "half.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}
    network.load(str(tmp_path / "half.safetensors"), tensors)
    assert {parameter.dtype for parameter in network.network.parameters()} == {torch.float32}


@each_case
def test_dim_from_weights(case):
    """A network made from a file trains on with the same shapes and gradients."""
    on = models(case)
    network = created(case, on)
    tensors = network.network.state_dict()
    other = models(case)
    further = {key: case.arguments[key] for key in case.module.training_arguments if key in case.arguments}
    factory = NetworkFactory(case.module.name)
    again, _ = factory.create_from_weights(1.0, "file", other, weights_sd=tensors, dropout=None, **further)
    again.apply(other, text=True, unet=True)
    again.network.load_state_dict(tensors, strict=True)
    again.prepare_gradients(other)
    again.network.eval()
    for part in (on, other):
        outputs(part.text_encoder, part.unet)[1].square().mean().backward()
    theirs = dict(network.network.named_parameters())
    assert {name: p.shape for name, p in again.network.named_parameters()} == {n: p.shape for n, p in theirs.items()}
    for name, parameter in again.network.named_parameters():
        assert parameter.requires_grad == theirs[name].requires_grad
        assert not parameter.requires_grad or torch.equal(parameter.grad, theirs[name].grad)


@each_that_limits_norms
def test_norm_limit_shrinks_the_change(case):
    """At a limit near 0 nothing of the change is left; at a high one nothing happens."""
    plain = pictures(models(case))
    on = models(case)
    network = created(case, on)
    changed = pictures(on)
    device = torch.device("cpu")
    scaled, _, largest = network.limit_norms(1e6, device)
    assert int(scaled) == 0 and torch.equal(pictures(on), changed)
    scaled, mean, limited = network.limit_norms(1e-6, device)
    assert int(scaled) > 0 and float(mean) <= float(limited) * 1.0001 <= 1.001e-6 < float(largest)
    assert close(pictures(on), plain)


@each_case
def test_unknown_arguments_are_refused_without_a_model(case):
    with pytest.raises(OptionError, match="--network_args surely_unknown"):
        NetworkFactory(case.module.name).check_arguments({"surely_unknown": "1"})


# ---------------------------------------------------------------------------------------------- keys


def described_keys(case: Case) -> dict[str, Any]:
    """What the golden file holds of a case: number, order, names and shapes of the keys of a file."""
    tensors = created(case, models(case)).network.state_dict()
    lines = [
        f"{key} {list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}" for key, tensor in tensors.items()
    ]
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    return {"keys": len(lines), "first": lines[:3], "last": lines[-3:], "sha256": digest}


@each_case
def test_keys_are_stable(case):
    golden = json.loads(GOLDEN.read_text())
    assert described_keys(case) == golden["cases"][case.name]


if __name__ == "__main__":
    made = "python -m tests.contracts.test_network_modules, on the tiny models; sha256 of lines 'key shape dtype'"
    content = {"made_by": made, "cases": {case.name: described_keys(case) for case in CASES}}
    GOLDEN.write_text(json.dumps(content, indent=1) + "\n")
