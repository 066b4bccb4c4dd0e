"""Changes of weights by files of every kind, against LyCORIS's own modules, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from library.options import OptionError
from networks.injection import product
from networks.weight_changes import bias_change, check_module, depends_on_weight, kind_of, weight_change

LAYERS = {
    "linear": lambda: torch.nn.Linear(12, 8),
    "square": lambda: torch.nn.Linear(8, 8),
    "1x1": lambda: torch.nn.Conv2d(12, 8, 1),
    "3x3": lambda: torch.nn.Conv2d(12, 8, 3, padding=1),
    "square 3x3": lambda: torch.nn.Conv2d(8, 8, 3, padding=1),
}
# name of the kind, LyCORIS's module, arguments
KINDS = [
    ("LoRA", "locon.LoConModule", {}),
    ("LoRA", "locon.LoConModule", {"use_tucker": True}),
    ("LoRA", "locon.LoConModule", {"rs_lora": True}),
    ("LoRA", "locon.LoConModule", {"weight_decompose": True}),
    ("LoRA", "locon.LoConModule", {"weight_decompose": True, "wd_on_out": False}),
    ("LoRA", "locon.LoConModule", {"weight_decompose": True, "use_tucker": True}),
    ("LoHa", "loha.LohaModule", {}),
    ("LoHa", "loha.LohaModule", {"use_tucker": True}),
    ("LoHa", "loha.LohaModule", {"weight_decompose": True, "wd_on_out": False}),
    ("LoKr", "lokr.LokrModule", {"factor": 2}),
    ("LoKr", "lokr.LokrModule", {"factor": 2, "use_tucker": True}),
    ("LoKr", "lokr.LokrModule", {"factor": 2, "full_matrix": True}),
    ("LoKr", "lokr.LokrModule", {"factor": 4, "decompose_both": True, "lora_dim": 1}),
    ("LoKr", "lokr.LokrModule", {"factor": 2, "weight_decompose": True}),
    ("full difference", "full.FullModule", {}),
    ("(IA)^3", "ia3.IA3Module", {}),
    ("(IA)^3", "ia3.IA3Module", {"train_on_input": True}),
]


def lycoris_module(path: str, layer: torch.nn.Module, arguments: dict[str, Any]) -> Any:
    """A module of LyCORIS, hooked to a layer, with random weights as after training."""
    pytest.importorskip("lycoris")
    import importlib

    file, name = path.split(".")
    arguments = {"lora_dim": 3, "alpha": 2.0, **arguments}
    module = getattr(importlib.import_module(f"lycoris.modules.{file}"), name)("x", layer, 1.0, **arguments)
    module.apply_to()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for key, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.3
            parameter.copy_(noise.abs() + 1 if key == "dora_scale" else noise)
    return module


def saved_parts(module: Any) -> dict[str, torch.Tensor]:
    return {key: value.detach().clone() for key, value in (module.custom_state_dict() or module.state_dict()).items()}


@pytest.mark.parametrize("layer_name", LAYERS)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind[0]} {kind[2]}")
def test_as_lycoris_computes_it(kind, layer_name):
    """What its layers put out; LyCORIS 4.1 itself merges LoHa and LoKr with the square of their scale."""
    name, path, arguments = kind
    layer = LAYERS[layer_name]()
    before, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    module = lycoris_module(path, layer, arguments)
    parts = saved_parts(module)
    x = torch.randn(2, 5, before.shape[1]) if before.ndim == 2 else torch.randn(2, before.shape[1], 6, 5)
    with torch.no_grad():
        wanted = layer(x)
    assert check_module("x", parts, before.shape, "some.safetensors").name == name
    change = weight_change(parts, before)
    assert change.dtype == torch.float32 and change.shape == before.shape and change.abs().max() > 1e-3
    by = bias_change(parts)
    ours = product(layer, x, before + change, bias if by is None else bias + by)
    torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=1e-5)
    elsewhere = weight_change(parts, torch.full_like(before, 7.0))
    assert torch.equal(elsewhere, change) != depends_on_weight(parts)


@pytest.mark.parametrize("layer", [torch.nn.GroupNorm(2, 8), torch.nn.LayerNorm(8)], ids=["group", "layer"])
def test_normalisations(layer):
    pytest.importorskip("lycoris")
    from lycoris.modules.norms import NormModule

    module = NormModule("x", layer, 1.0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
        merged, merged_bias = module.get_merged_weight(1.0)
    parts = saved_parts(module)
    assert check_module("x", parts, layer.weight.shape, "some.safetensors").name == "norm"
    torch.testing.assert_close(layer.weight + weight_change(parts, layer.weight), merged)
    torch.testing.assert_close(layer.bias + bias_change(parts), merged_bias)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = {"hada_w1_a": (8, 2), "hada_w1_b": (2, 12), "hada_w2_a": (8, 2), "hada_w2_b": (2, 12)}
    parts = {key: torch.randn(shape, generator=generator).to(dtype) for key, shape in shapes.items()}
    full = {key: value.double() for key, value in parts.items()}
    wanted = (full["hada_w1_a"] @ full["hada_w1_b"]) * (full["hada_w2_a"] @ full["hada_w2_b"])
    change = weight_change(parts, torch.empty(8, 12, dtype=dtype))
    torch.testing.assert_close(change.double(), wanted, atol=1e-5, rtol=1e-5)


def test_magnitudes_of_peft_are_of_outputs():
    """PEFT writes those of convolutions as (1, O, 1, 1), which is LyCORIS's shape for inputs."""
    weight = torch.randn(8, 8, 3, 3)
    parts = {"lora_down.weight": torch.randn(2, 8, 3, 3), "lora_up.weight": torch.randn(8, 2, 1, 1)}
    plain = weight + weight_change(parts, weight)
    norms = torch.rand(8) + 1
    by_output = weight + weight_change(parts | {"lora_magnitude_vector": norms.view(1, 8, 1, 1)}, weight)
    torch.testing.assert_close(by_output, plain * (norms / plain.flatten(1).norm(dim=1)).view(8, 1, 1, 1))
    by_input = weight + weight_change(parts | {"dora_scale": norms.view(1, 8, 1, 1)}, weight)
    torch.testing.assert_close(
        by_input, plain * (norms / plain.mT.transpose(0, 1).flatten(1).norm(dim=1)).view(1, 8, 1, 1)
    )


LORA = {"lora_down.weight": torch.zeros(2, 12), "lora_up.weight": torch.zeros(8, 2)}
LOHA = {"hada_w1_a": torch.zeros(8, 2), "hada_w1_b": torch.zeros(2, 12)}
LOKR = {"lokr_w1": torch.zeros(2, 2), "lokr_w2": torch.zeros(4, 6)}


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"oft_blocks": torch.zeros(2, 4, 4)}, "some.pt is of a kind that is not known: x has oft_blocks; use"),
        ({"a1.weight": torch.zeros(2), "b2.weight": torch.zeros(2)}, "is not known: x has a1.weight, b2.weight"),
        ({"alpha": torch.tensor(1.0)}, "is not known: x has alpha"),
        (LORA | {"w_norm": torch.zeros(8)}, "is not known: x has lora_down.weight, lora_up.weight, w_norm"),
        ({"w_norm": torch.zeros(8), "dora_scale": torch.zeros(8, 1)}, "is not known: x has dora_scale, w_norm"),
        (LOHA, "some.pt is incomplete: x has no hada_w2_a, hada_w2_b"),
        ({"lokr_w1": torch.zeros(2, 2)}, "some.pt is incomplete: x has no lokr_w2"),
        ({"lora_mid.weight": torch.zeros(2, 2, 3, 3)}, "is incomplete: x has no lora_down.weight, lora_up.weight"),
        (LOKR | {"lokr_w1_a": torch.zeros(2, 2)}, "is damaged: lokr_w1, lokr_w1_a, lokr_w2 of x don't belong together"),
        (
            LORA | {"lora_up.weight": torch.zeros(8, 3)},
            r"is damaged: .*up.weight \[8, 3\] of x don't fit together",
        ),
        (LORA | {"alpha": torch.zeros(2)}, "is damaged: alpha of x is no single number"),
        (LORA | {"alpha": torch.tensor(float("nan"))}, "some.pt: alpha of x is nan, no finite number"),
        (LORA | {"alpha": torch.tensor(1j)}, "is damaged: alpha of x is no single number"),
        (
            LOHA | {f"hada_w2_{side}": torch.full(LOHA[f"hada_w1_{side}"].shape, torch.inf) for side in "ab"},
            "some.pt: hada_w2_a of x holds NaN or infinity",
        ),
        (LOKR | {"lokr_w1": torch.zeros(2, 2, dtype=torch.int8)}, "lokr_w1 of x is of type int8"),
        (LORA | {"lora_up.weight": torch.zeros(8, 2, 3, 3)}, r"is damaged: .*\[8, 2, 3, 3\] of x don't fit together"),
        (LORA | {"dora_scale": torch.zeros(5, 1)}, r"is damaged: dora_scale of x has the shape \[5, 1\]"),
        (LORA | {"diff_b": torch.zeros(9)}, "is damaged: the bias of x has 9 numbers"),
        (LOKR | {"lokr_w2": torch.zeros(4, 8)}, "model family: x has 16 inputs and 8 outputs there, 12 and 8 here"),
    ],
)
def test_what_is_refused(parts, said):
    with pytest.raises(OptionError, match=said):
        check_module("x", parts, (8, 12), "some.pt")


def test_kinds_by_names():
    assert kind_of(["lora_up.weight", "dora_scale"]).name == "LoRA"  # incomplete, but clearly meant
    assert kind_of(["diff_b"]).name == "full difference"
    assert kind_of(["alpha", "dora_scale"]) is None
    assert kind_of(["emb_params"]) is None
