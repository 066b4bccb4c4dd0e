"""Files that LyCORIS writes, of every kind, drawn with and merged by networks.lora: as LyCORIS's own layers compute."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.options import OptionError
from library.targets.adapter import Adapted, Models, NetworkFactory
from networks.any_kind import AnyKindNetwork
from networks.lora import LoRAModule, create_network
from tests.tiny_networks import outputs, perturb, tiny_parts

pytest.importorskip("lycoris")

CASES = {
    "LoHa": ("sd1", {"algo": "loha", "conv_dim": "2"}, "hada_w1_a"),
    "LoHa tucker SD2": ("sd2", {"algo": "loha", "conv_dim": "2", "use_tucker": "True"}, "hada_t1"),
    "LoKr": ("sd1", {"algo": "lokr", "conv_dim": "2", "factor": "4"}, "lokr_w1"),
    "LoKr tucker SDXL": ("sdxl", {"algo": "lokr", "conv_dim": "1", "factor": "2", "use_tucker": "True"}, "lokr_t2"),
    "LoCon everywhere": ("sd1", {"algo": "locon", "conv_dim": "2"}, "lora_up.weight"),
    "DoRA": ("sd1", {"algo": "locon", "conv_dim": "2", "dora_wd": "True"}, "dora_scale"),
    "DoRA of inputs SDXL": ("sdxl", {"algo": "locon", "conv_dim": "2", "dora_wd": "True", "wd_on_output": "False"},
                            "dora_scale"),
    "full with norms": ("sd1", {"algo": "full", "train_norm": "True"}, "w_norm"),
    "(IA)^3": ("sd1", {"algo": "ia3"}, "on_input"),
}  # fmt: skip
ALPHA = 2.0


def models(kind: str) -> Models:
    text_encoder, unet = tiny_parts(kind)
    encoders = tuple(text_encoder) if isinstance(text_encoder, list) else (text_encoder,)
    return Models(encoders, unet, torch.nn.Identity())


@torch.no_grad()
def drawn(on: Models) -> torch.Tensor:
    return torch.cat([part.flatten() for part in outputs(on.text_encoder, on.unet)])


@dataclass(frozen=True)
class Written:
    """A file of LyCORIS, and what its network draws."""

    file: Path
    result: torch.Tensor


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Written]:
    @functools.cache
    def write(case: str) -> Written:
        logging.disable(logging.INFO)
        kind, arguments, part = CASES[case]
        on = models(kind)
        network = NetworkFactory("lycoris.kohya").create(4, ALPHA, None, on, **arguments)
        network.apply(on, text=True, unet=True)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in network.network.parameters():
                parameter += torch.randn(parameter.shape, generator=generator) * 0.03
        result = drawn(on)
        file = tmp_path_factory.mktemp("lycoris") / "net.safetensors"
        network.save(file, None, {})
        assert any(key.endswith(f".{part}") for key in load_file(file)), "the case is about these parts"
        return Written(file, result)

    return write


def loaded(file: Path, on: Models, multiplier: float = 1.0) -> tuple[Adapted, Any]:
    network, tensors = NetworkFactory("networks.lora").create_from_weights(
        multiplier, str(file), on, for_inference=True
    )
    assert isinstance(network.network, AnyKindNetwork)
    return network, tensors


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("case", CASES)
def test_applied_merged_and_calculated(case, written):
    made = written(case)
    on = models(CASES[case][0])
    plain = drawn(on)
    assert not close(made.result, plain)
    network, tensors = loaded(made.file, on)
    network.apply(on, text=True, unet=True)
    assert network.load(str(made.file), tensors) == len(load_file(made.file))
    network.network.eval().requires_grad_(False)
    assert close(drawn(on), made.result)
    network.set_multiplier(0.0)
    assert torch.equal(drawn(on), plain)
    network.set_multiplier(0.5)
    half = drawn(on)
    assert not close(half, made.result) and not close(half, plain)
    network.back_up_weights()
    network.calculate_weights()
    assert close(drawn(on), half)
    network.restore_weights()
    assert torch.equal(drawn(on), half)

    merged = models(CASES[case][0])
    network, tensors = loaded(made.file, merged, 0.5)
    network.merge(merged, tensors, torch.float32, torch.device("cpu"))
    assert close(drawn(merged), half)


@pytest.mark.parametrize("case", ["LoKr tucker SDXL", "full with norms"])
def test_regions(case, written):
    """With the whole picture it is the plain network, with half of it another one."""
    on = models(CASES[case][0])
    network = loaded(written(case).file, on)[0].network
    network.apply_to(on.text_encoder, on.named_unet)
    for adapter in network.text_adapters:
        adapter.multiplier = 0.0  # a batch as large as that of the pictures is taken for negative prompts
    plain = drawn(on)
    whole = torch.ones(128, 128)
    results = []
    for mask in (whole, whole * (torch.arange(128) < 64)):
        network.set_region(0, True, mask)
        network.set_current_generation(2, 1, 128, 128, {})
        results.append(drawn(on))
    assert close(results[0], plain) and not close(results[1], plain)
    network.leave_region()
    assert torch.equal(drawn(on), plain)


def test_mixed_files(written):
    """LoHa in the U-Net and LoRA in the text encoder: both parts work, each as alone."""
    lora = create_network(1.0, 4, 2.0, None, *tiny_parts())
    perturb(lora, std=0.1)
    tensors = {key: value for key, value in load_file(written("LoHa").file).items() if "_unet_" in key}
    tensors |= {key: value.clone() for key, value in lora.state_dict().items() if key.startswith("lora_te_")}
    results = []
    for part in ("", "lora_te", "lora_unet"):
        on = models("sd1")
        chosen = {key: value for key, value in tensors.items() if key.startswith(part)}
        network, _ = NetworkFactory("networks.lora").create_from_weights(
            1.0, "mixed", on, weights_sd=chosen, for_inference=True
        )
        network.apply(on, text=True, unet=True)
        network.network.load_state_dict(chosen, strict=True)
        if not part:
            assert all(isinstance(adapter, LoRAModule) for adapter in network.network.text_adapters)
        results.append(drawn(on))
    text_alone, unet_alone = results[1:]
    text_size = len(results[0]) - 2 * 4 * 16 * 16
    assert torch.equal(results[0][:text_size], text_alone[:text_size])
    assert not torch.equal(results[0][text_size:], unet_alone[text_size:])  # it sees other texts
    assert not torch.equal(text_alone[:text_size], unet_alone[:text_size])


def test_half_precision_on_a_half_precision_model(written, tmp_path):
    made, half = written("DoRA"), tmp_path / "half.safetensors"
    save_file({key: value.half() for key, value in load_file(made.file).items()}, half)
    on = models("sd1")
    network, tensors = loaded(half, on)
    network.apply(on, text=True, unet=True)
    network.load(str(half), tensors)
    network.network.to(torch.bfloat16)
    for part in (on.unet, *on.text_encoders):
        part.to(torch.bfloat16)
    assert (drawn(on).float() - made.result).norm() < 0.03 * made.result.norm()


def test_training_from_such_a_file_is_refused(written):
    with pytest.raises(OptionError, match="holds LoHa, which networks.lora draws with and merges, but does not train"):
        NetworkFactory("networks.lora").create_from_weights(1.0, str(written("LoHa").file), models("sd1"))


def test_unknown_kinds_and_other_models_are_refused():
    on = models("sd1")
    name = "lora_unet_conv_in"

    def made(tensors: dict[str, torch.Tensor]) -> None:
        NetworkFactory("networks.lora").create_from_weights(1.0, "some.pt", on, weights_sd=tensors, for_inference=True)

    with pytest.raises(OptionError, match=f"some.pt is of a kind that is not known: {name} has oft_blocks"):
        made({f"{name}.oft_blocks": torch.zeros(2, 16, 16)})
    with pytest.raises(OptionError, match="some.pt was made for SDXL: none of its 1 modules is in this model"):
        made({"lora_unet_input_blocks_1_0_in_layers_2.diff": torch.zeros(2, 16, 16)})
    with pytest.raises(
        OptionError, match=f"some.pt does not fit: it changes the bias of {name.replace('conv_in', '')}"
    ):
        made({"lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q.diff_b": torch.zeros(64)})
