"""library.checkpoints.merging: sums of model files, against numpy in float64."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from library.checkpoints.keymaps import CLIP_PREFIX, OPENCLIP_PREFIX, SDXL_OPENCLIP_PREFIX, UNET_PREFIX
from library.checkpoints.merging import PIECE, MergeSettings, merged_entries, open_model, unmatched
from library.checkpoints.safetensors_io import NonFiniteError, write_entries
from library.checkpoints.weights import load_tensors
from library.options import OptionError

CONV = f"{UNET_PREFIX}input_blocks.0.0.weight"
PROJ = f"{UNET_PREFIX}input_blocks.1.1.proj_in.weight"
ATTENTION = f"{UNET_PREFIX}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
VAE = "first_stage_model.encoder.conv_in.weight"
TEXT = f"{CLIP_PREFIX}text_model.final_layer_norm.weight"
IDS = f"{CLIP_PREFIX}text_model.embeddings.position_ids"


def little(seed: int, **more: torch.Tensor) -> dict[str, torch.Tensor]:
    """The names by which a file is known as SD 1.x, and one tensor of each part."""
    random = torch.Generator().manual_seed(seed)
    shapes = {CONV: (8, 4, 3, 3), PROJ: (8, 8, 1, 1), ATTENTION: (8, 768), VAE: (8, 3, 3, 3), TEXT: (768,)}
    tensors = {name: torch.randn(shape, generator=random) for name, shape in shapes.items()}
    return tensors | {IDS: torch.arange(77)[None], "v_pred": torch.empty(0)} | more


def merged(folder: Path, models: list[Mapping[str, torch.Tensor]], *ratios: float, **settings) -> dict:
    paths = [folder / f"{number}.safetensors" for number in range(len(models))]
    for path, tensors in zip(paths, models, strict=True):
        save_file(dict(tensors), path)
    files = [open_model(path, "--models") for path in paths]
    unmatched(files, "--models")
    write_entries(merged_entries(files, MergeSettings(ratios, **settings)), folder / "out.safetensors")
    return load_tensors(folder / "out.safetensors")


def test_the_weighted_sum(tmp_path):
    one, two, three = little(1), little(2), little(3)
    two = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in two.items()}
    made = merged(tmp_path, [one, two, three], 0.5, 0.3, 0.4)
    assert set(made) == set(one)
    for name in (CONV, PROJ, ATTENTION, VAE, TEXT):
        right = sum(r * m[name].double().numpy() for r, m in zip((0.5, 0.3, 0.4), (one, two, three), strict=True))
        assert made[name].dtype == torch.float32
        np.testing.assert_allclose(made[name].numpy(), right, atol=1e-6)


def test_whole_numbers_are_the_first_ones(tmp_path):
    two = little(2, **{IDS: torch.arange(77)[None] + 1000})
    made = merged(tmp_path, [little(1), two], 0.5, 0.5, saving_precision="fp16")
    assert made[IDS].dtype == torch.int64 and torch.equal(made[IDS], torch.arange(77)[None])
    assert made[CONV].dtype == torch.float16 and made["v_pred"].shape == (0,)
    spoiled = little(1, **{IDS: torch.arange(77)[None].half()})  # as some tools write them
    assert torch.equal(merged(tmp_path, [spoiled, two], 0.5, 0.5)[IDS], torch.arange(77)[None])


@pytest.mark.parametrize("order", [0, 1])
def test_a_text_encoder_spelled_otherwise_counts_once(tmp_path, order):
    models = [little(1), little(2)]
    models[order] = {name.replace("text_model.", ""): tensor for name, tensor in models[order].items()}
    made = merged(tmp_path, models, 0.25, 0.75)
    right = 0.25 * little(1)[TEXT] + 0.75 * little(2)[TEXT]
    assert torch.allclose(made[TEXT], right, atol=1e-6)
    assert TEXT.replace("text_model.", "") not in made


def test_what_a_model_lacks_is_the_first_ones(tmp_path):
    two = {name: tensor for name, tensor in little(2).items() if name != VAE} | {"model_ema.x": torch.ones(1)}
    made = merged(tmp_path, [little(1), two], 0.5, 0.5)
    assert torch.equal(made[VAE], little(1)[VAE]) and "model_ema.x" not in made
    made = merged(tmp_path, [little(1), two], 0.5, 0.25)
    assert torch.allclose(made[VAE], 0.75 * little(1)[VAE])
    files = [open_model(tmp_path / f"{number}.safetensors", "--models") for number in range(2)]
    found = unmatched(files, "--models")
    assert (found[0].missing, found[0].skipped) == ((), ())
    assert (found[1].missing, found[1].skipped) == ((VAE,), ("model_ema.x",))


def test_the_unet_alone(tmp_path):
    made = merged(tmp_path, [little(1), little(2)], 0.5, 0.25, unet_only=True)
    assert torch.equal(made[VAE], little(1)[VAE]) and torch.equal(made[TEXT], little(1)[TEXT])
    assert torch.allclose(made[CONV], 0.5 * little(1)[CONV] + 0.25 * little(2)[CONV])


def test_matrices_and_pointwise_convolutions_are_the_same(tmp_path):
    two = little(2)
    two[PROJ] = two[PROJ][:, :, 0, 0]
    made = merged(tmp_path, [little(1), two], 0.5, 0.5)
    assert made[PROJ].shape == (8, 8, 1, 1)
    assert torch.allclose(made[PROJ][:, :, 0, 0], (little(1)[PROJ][:, :, 0, 0] + two[PROJ]) / 2)


def test_a_projection_in_either_layout(tmp_path):
    name = f"{SDXL_OPENCLIP_PREFIX}text_projection"
    one, two = little(1), little(2)
    one[name], two[f"{name}.weight"] = torch.randn(6, 6), torch.randn(6, 6)
    made = merged(tmp_path, [one, two], 0.5, 0.5)
    assert torch.allclose(made[name], (one[name] + two[f"{name}.weight"].T) / 2)


def test_precisions(tmp_path):
    made = merged(tmp_path, [little(1), little(2)], 0.5, 0.5, precision="bf16", saving_precision="float")
    right = 0.5 * little(1)[CONV].bfloat16() + 0.5 * little(2)[CONV].bfloat16()
    assert torch.equal(made[CONV], right.float())
    eighth = {name: t.to(torch.float8_e4m3fn) if t.ndim > 1 and t.is_floating_point() else t
              for name, t in little(2).items()}  # fmt: skip
    made = merged(tmp_path, [little(1), eighth], 0.5, 0.5)
    assert torch.allclose(made[CONV], (little(1)[CONV] + eighth[CONV].float()) / 2)


def test_tensors_of_several_pieces(tmp_path):
    size = PIECE + 5
    one, two = (little(seed, big=torch.full((size,), float(seed))) for seed in (1, 3))
    assert torch.equal(merged(tmp_path, [one, two], 0.5, 0.5)["big"], torch.full((size,), 2.0))


def test_models_of_two_kinds(tmp_path):
    with pytest.raises(OptionError, match=r"0.safetensors is SD 1.x, and .*1.safetensors is SDXL; merge models of one"):
        merged(tmp_path, [little(1), little(2) | {f"{SDXL_OPENCLIP_PREFIX}ln_final.weight": torch.ones(4)}], 1, 1)
    sd2 = {name.replace(CLIP_PREFIX, OPENCLIP_PREFIX): tensor for name, tensor in little(2).items()}
    with pytest.raises(OptionError, match="is SD 1.x, and .* is SD 2.x"):
        merged(tmp_path, [little(1), sd2], 1, 1)
    with pytest.raises(OptionError, match=r"is SD 1.x, and .* is SD 1.x, for inpainting"):
        merged(tmp_path, [little(1), little(2, **{CONV: torch.zeros(8, 9, 3, 3)})], 1, 1)
    with pytest.raises(OptionError, match=r"attn2.to_k.weight is \[8, 768\] in .*0.safetensors and \[9, 768\] in"):
        merged(tmp_path, [little(1), little(2, **{ATTENTION: torch.zeros(9, 768)})], 1, 1)
    with pytest.raises(OptionError, match=r"1.safetensors is a LoRA, not a model; merge LoRAs by"):
        merged(tmp_path, [little(1), {"lora_unet_x.lora_down.weight": torch.zeros(4, 4)}], 1, 1)
    with pytest.raises(OptionError, match="has no tensor in common"):
        merged(tmp_path, [{"a": torch.ones(1)}, {"b": torch.ones(1)}], 1, 1)
    assert not (tmp_path / "out.safetensors").exists()


def test_numbers_that_are_none(tmp_path):
    broken = little(2)
    broken[VAE][0, 0, 0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"1.safetensors: first_stage_model.encoder.conv_in.weight holds NaN"):
        merged(tmp_path, [little(1), broken], 0.5, 0.5)
    large = little(2, **{CONV: torch.full((8, 4, 3, 3), 1e6)})
    with pytest.raises(NonFiniteError, match="input_blocks.0.0.weight is too large for float16 once it is summed"):
        merged(tmp_path, [little(1), large], 0.5, 0.5, saving_precision="fp16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.safetensors", "1.safetensors"]
    with pytest.raises(NonFiniteError, match="too large for float16 once it is summed; use --precision bf16 or float$"):
        merged(tmp_path, [little(1), large], 0.5, 0.5, precision="fp16")
    with pytest.raises(NonFiniteError, match="too large for float32 once it is summed; use smaller --ratios$"):
        merged(tmp_path, [little(1), little(2)], 1e40, 0.5)
