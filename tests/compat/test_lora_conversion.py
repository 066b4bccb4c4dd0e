"""tools/convert_lora.py: there and back byte for byte, and what diffusers makes of the files."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from library.checkpoints.safetensors_io import save_file
from networks.injection import write_network_file
from networks.lora import create_network, create_network_from_weights
from tests.compat.test_lora_diffusers import diffusers_pipeline, lora_layers, sdxl_outputs, sdxl_pipeline
from tests.tiny_networks import perturb, tiny_parts
from tools.convert_lora import TOOL

CONV = {"conv_dim": "2", "conv_alpha": "1.5"}
CASES = {
    "sd1": ("sd1", {}),
    "sd1 conv": ("sd1", CONV),
    "sd2 conv": ("sd2", CONV),
    "sdxl conv": ("sdxl", CONV),
    "sdxl upper half": ("sdxl", {"block_dims": ",".join(["0"] * 13 + ["2"] * 10)}),
}
METADATA = {"ss_network_dim": "4", "ss_network_alpha": "3.0", "ss_tag_frequency": '{"a": {"b": 1}}'}


def convert(*words: object) -> int:
    return TOOL.run([str(word) for word in words])


def lora(path: Path, kind: str, dtype: torch.dtype | None = None, **arguments: str) -> Any:
    """(text encoders, U-Net, network) of a LoRA whose file is written to `path`."""
    text_encoder, unet = tiny_parts(kind)
    network = create_network(1.0, 4, 3.0, None, text_encoder, unet, **arguments)
    perturb(network)
    network.save_weights(path, dtype, METADATA)
    return text_encoder, unet, network


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_there_and_back_is_the_same_file(case: str, dtype: torch.dtype | None, tmp_path: Path) -> None:
    kind, arguments = CASES[case]
    lora(tmp_path / "a.safetensors", kind, dtype, **arguments)
    assert convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors") == 0
    keys = load_file(tmp_path / "b.safetensors")
    assert all(key.startswith(("unet.", "text_encoder.", "text_encoder_2.")) for key in keys)
    assert all(key.endswith((".lora_A.weight", ".lora_B.weight")) for key in keys)
    assert convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors") == 0
    assert (tmp_path / "c.safetensors").read_bytes() == (tmp_path / "a.safetensors").read_bytes()


def test_odd_alphas_survive(tmp_path: Path) -> None:
    """None, of other types, of other forms, of other values than most; layers as convolutions where they are none."""
    pair = {"lora_down.weight": torch.randn(2, 8), "lora_up.weight": torch.randn(8, 2)}
    names = [f"lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_{x}" for x in "qkv"]
    tensors = {f"{name}.{part}": tensor for name in names for part, tensor in pair.items()}
    context = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    tensors |= {f"{context}.lora_down.weight": torch.randn(2, 1024), f"{context}.lora_up.weight": torch.randn(8, 2)}
    proj = "lora_unet_mid_block_attentions_0_proj_in"
    tensors |= {f"{proj}.lora_down.weight": torch.randn(2, 8, 1, 1), f"{proj}.lora_up.weight": torch.randn(8, 2, 1, 1)}
    tensors |= {f"{names[0]}.alpha": torch.tensor(7), f"{names[1]}.alpha": torch.tensor([0.1], dtype=torch.bfloat16)}
    tensors |= {f"{context}.alpha": torch.tensor(1 / 3)}
    write_network_file(tensors, tmp_path / "a.safetensors", {})
    assert convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors") == 0
    assert load_file(tmp_path / "b.safetensors")["unet.mid_block.attentions.0.proj_in.lora_A.weight"].ndim == 2
    assert convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors") == 0
    assert (tmp_path / "c.safetensors").read_bytes() == (tmp_path / "a.safetensors").read_bytes()


# ------------------------------------------------------------------------------------------ diffusers


def pipeline_of(kind: str, text_encoder: Any, unet: Any) -> Any:
    return sdxl_pipeline(text_encoder, unet) if kind == "sdxl" else diffusers_pipeline(kind, text_encoder, unet)


@torch.no_grad()
def outputs(kind: str, text_encoder: Any, unet: Any, pipeline: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
    """(text states, U-Net output) of ours, or of diffusers' models."""
    if kind == "sdxl":
        theirs = pipeline and (pipeline.text_encoder, pipeline.text_encoder_2)
        return sdxl_outputs(theirs or text_encoder, pipeline.unet if pipeline else unet)
    ids = torch.randint(0, 49408, (2, 77), generator=torch.Generator().manual_seed(0))
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    states = pipeline.text_encoder(ids)[0] if pipeline else text_encoder(ids)
    model = pipeline.unet if pipeline else unet
    return states, model(latents, torch.tensor([10, 700]), states, return_dict=False)[0]


@pytest.mark.parametrize("case", ["sd1 conv", "sd2 conv", "sdxl conv", "sdxl upper half"])
@pytest.mark.parametrize("folds", [False, True])
def test_diffusers_computes_the_same_with_the_converted_file(
    case: str, folds: bool, tmp_path: Path, caplog: Any
) -> None:
    pytest.importorskip("peft")
    kind, arguments = CASES[case]
    text_encoder, unet, network = lora(tmp_path / "a.safetensors", kind, **arguments)
    pipeline = pipeline_of(kind, text_encoder, unet)
    assert convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", *(["--fold_alpha"] if folds else [])) == 0
    plain = outputs(kind, text_encoder, unet)[1]
    network.apply_to(text_encoder, unet)
    states, ours = outputs(kind, text_encoder, unet)
    with caplog.at_level(logging.WARNING):
        logging.getLogger("diffusers").addHandler(caplog.handler)
        pipeline.load_lora_weights(tmp_path, weight_name="b.safetensors")
    assert not [record for record in caplog.messages if "key" in record.lower()]
    assert lora_layers(pipeline.unet) == len(network.unet_adapters)
    their_states, theirs = outputs(kind, None, None, pipeline)
    torch.testing.assert_close(their_states, states, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=1e-3)
    assert (ours - plain).abs().mean() > 100 * (ours - theirs).abs().mean()


@pytest.mark.parametrize("rank_stabilized", [False, True])
def test_alphas_that_diffusers_notes_in_headers_count_here(rank_stabilized: bool, tmp_path: Path) -> None:
    """Ranks and alphas of a training with peft, saved by diffusers: the same strength here, converted or not."""
    peft = pytest.importorskip("peft")
    from diffusers import StableDiffusionPipeline
    from diffusers.training_utils import _collate_lora_metadata
    from peft.utils import get_peft_model_state_dict

    text_encoder, unet = tiny_parts("sd1")
    pipeline = diffusers_pipeline("sd1", text_encoder, unet)
    of_unet = peft.LoraConfig(
        r=4, lora_alpha=2, target_modules=["to_q", "to_k", "conv1"], alpha_pattern={"to_k": 7.0},
        rank_pattern={"to_k": 2}, use_rslora=rank_stabilized,
    )  # fmt: skip
    pipeline.unet.add_adapter(of_unet)
    pipeline.text_encoder.add_adapter(peft.LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "fc1"]))
    perturb(pipeline.unet)
    perturb(pipeline.text_encoder)
    parts = {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}
    StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=get_peft_model_state_dict(pipeline.unet),
        text_encoder_lora_layers=get_peft_model_state_dict(pipeline.text_encoder),
        weight_name="theirs.safetensors",
        **_collate_lora_metadata(parts),
    )
    their_states, theirs = outputs("sd1", None, None, pipeline)
    assert convert(tmp_path / "theirs.safetensors", tmp_path / "ours.safetensors") == 0
    for name in ("theirs.safetensors", "ours.safetensors"):
        text_encoder, unet = tiny_parts("sd1")
        network, _ = create_network_from_weights(1.0, tmp_path / name, None, text_encoder, unet, for_inference=True)
        network.apply_to(text_encoder, unet)
        network.load_weights(tmp_path / name)
        states, ours = outputs("sd1", text_encoder, unet)
        torch.testing.assert_close(states, their_states, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)
    with safe_open(tmp_path / "ours.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_network_module"] == "networks.lora"
    assert metadata["ss_network_dim"] == metadata["ss_network_alpha"] == "Dynamic"
    assert len(metadata["sshs_model_hash"]) == 64


# ------------------------------------------------------------------------------------------ mistakes


def test_mistakes_are_named_and_nothing_is_written(tmp_path: Path, capsys: Any) -> None:
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    good = {f"{name}.lora_down.weight": torch.ones(2, 8), f"{name}.lora_up.weight": torch.ones(8, 2)}
    odd = {
        "dora": good | {f"{name}.dora_scale": torch.ones(8, 1)},
        "loha": {f"{name}.hada_w1_a": torch.ones(8, 2)},
        "unknown": {key.replace("mid_block", "no_block"): value for key, value in good.items()},
        "half": {f"{name}.lora_down.weight": torch.ones(2, 8)},
        "plain": good,
    }
    for stem, tensors in odd.items():
        save_file(tensors, tmp_path / f"{stem}.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "plain.safetensors").read_bytes()[:-8])
    nan = {key: value * float("nan") for key, value in good.items()}
    torch.save(nan, tmp_path / "nan.pt")
    bad_header = {"lora_adapter_metadata": json.dumps({"unet.alpha_pattern": {"(": 1}})}
    save_file({f"unet.x.lora_{side}.weight": torch.ones(2, 2) for side in "AB"}, tmp_path / "h.safetensors", bad_header)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    out = tmp_path / "out.safetensors"
    cases = [
        (["dora.safetensors", out], "is no plain LoRA"),
        (["loha.safetensors", out], "is no plain LoRA but LoHa with 1 module: it has"),
        (["unknown.safetensors", out], "is the name of no layer"),
        (["half.safetensors", out], "is incomplete"),
        (["cut.safetensors", out], "is truncated"),
        (["nan.pt", out], "holds NaN or infinity"),
        (["h.safetensors", out], "lora_adapter_metadata"),
        (["none.safetensors", out], "does not exist"),
        (["plain.safetensors", tmp_path / "plain.safetensors"], "which would be replaced"),
        (["plain.safetensors", tmp_path / "out.ckpt"], "no extension .safetensors"),
        (["plain.safetensors", out, "--to", "kohya"], "--to: "),
    ]
    for (source, *words), said in cases:
        assert convert(tmp_path / source, *words) == 2
        error = capsys.readouterr().err
        assert said in error and len([line for line in error.splitlines() if "converting:" not in line]) == 1, error
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    "form",
    [
        {"alpha": ["XX", 0], "alphas": {}},
        {"alpha": ["C64", 0], "alphas": {}},
        {"alpha": ["F32", -1], "alphas": {}},
        {"alpha": ["F32", 1e9], "alphas": {}},
        {"alpha": None, "alphas": {"x": ["F99", 0]}},
        {"alpha": None, "alphas": {}, "dimensions": {"x": "many"}},
        {"alpha": None, "alphas": []},
        [],
    ],
)
def test_notes_on_the_trades_form_are_checked(form: Any, tmp_path: Path, capsys: Any) -> None:
    tensors = {f"unet.x.lora_{side}.weight": torch.ones(2, 2) for side in "AB"}
    save_file(tensors, tmp_path / "a.safetensors", {"lora_trade_form": json.dumps(form)})
    assert convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors") == 2
    assert "lora_trade_form of its header can't be understood" in capsys.readouterr().err
    assert not (tmp_path / "b.safetensors").exists()
