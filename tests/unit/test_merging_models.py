"""Networks merged into models, against dense float64 sums on the modules of the loaded model."""

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from library.checkpoints.keymaps import V_PREDICTION_MARKER
from library.checkpoints.safetensors_io import NonFiniteError, entry_of, read_header
from library.checkpoints.torch_file import write_torch_file
from library.checkpoints.weights import load_tensors
from library.options import OptionError
from networks import extract_lora_from_models
from networks.lora_creation import model_layers
from networks.merge_lora import merge
from networks.weights.merge_options import MergeOptions, SdMergeOptions
from tests.tiny_loras import dense_changes, layer_shapes, lora_tensors, tiny_lora
from tools import merge_models, verify_model


def into(model, output, *networks, ratios=None, **settings):
    paths = tuple(map(str, networks))
    ratios = ratios or (1.0,) * len(paths)
    merge(MergeOptions(sd_model=str(model), save_to=str(output), models=paths, ratios=tuple(ratios), **settings))
    return output


def weights_by_name(kind, path):
    """Name in files of networks -> weight of the loaded model."""
    from library.families.base import LoadPlan
    from library.families.options import ModelOptions
    from library.families.sd import StableDiffusion
    from library.families.sdxl import StableDiffusionXL
    from library.models.options import AttentionOptions

    family = StableDiffusionXL() if kind == "sdxl" else StableDiffusion()
    plan = LoadPlan(torch.float32, torch.float32, torch.float32, torch.device("cpu"))
    model = family.load(ModelOptions(pretrained_model_name_or_path=str(path)), AttentionOptions(), plan)
    encoders = list(model.text_encoders)
    layers = model_layers(encoders if len(encoders) > 1 else encoders[0], model.unet, has_convs=True)
    return {name: layer.weight.detach().double().flatten(1) for name, layer in layers.all}


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_the_sum_of_two_networks(kind, request, tmp_path):
    model = request.getfixturevalue(f"tiny_{kind}_path")
    first = tiny_lora(tmp_path / "a.safetensors", kind, dtype=torch.bfloat16, rank=8)
    second = tiny_lora(tmp_path / "b.safetensors", kind, seed=2, alpha=None, every=3)
    merged = into(model, tmp_path / "out.safetensors", first, second, ratios=(0.7, -0.4))
    before, after = weights_by_name(kind, model), weights_by_name(kind, merged)
    one, two = dense_changes(first), dense_changes(second)
    for name, weight in before.items():
        expected = weight + 0.7 * one[name] + (-0.4 * two[name] if name in two else 0)
        torch.testing.assert_close(after[name], expected, rtol=1e-5, atol=1e-6)
    assert len(before) == len(layer_shapes(kind)) == len(one) > len(two) > 10


def test_what_no_network_changes_is_copied(tiny_sd1_path, tmp_path):
    source = {name: tensor.half() if tensor.is_floating_point() else tensor
              for name, tensor in load_tensors(tiny_sd1_path).items()}  # fmt: skip
    source["alphas_cumprod"] = load_tensors(tiny_sd1_path)["alphas_cumprod"]
    source["something.else"] = torch.tensor([float("nan"), 1.0])  # nobody's business
    save_file({name: tensor.contiguous() for name, tensor in source.items()}, tmp_path / "m.safetensors")
    network = tiny_lora(tmp_path / "a.safetensors", "sd1", every=20)
    merged = load_tensors(into(tmp_path / "m.safetensors", tmp_path / "out.safetensors", network))
    changed = {name for name, tensor in merged.items() if tensor.dtype != source[name].dtype}
    assert len(changed) == len(lora_tensors("sd1", every=20)) // 3
    for name in merged.keys() - changed:
        assert (
            merged[name].dtype == source[name].dtype
            and merged[name].numpy().tobytes() == source[name].numpy().tobytes()
        )
    for name in changed:
        assert merged[name].dtype is torch.float32 and not torch.equal(merged[name], source[name].float())


@pytest.mark.parametrize(("settings", "is_told"), [({}, True), ({"save_precision": "fp16"}, False)])
def test_it_is_told_that_changed_tensors_are_of_another_precision(settings, is_told, tiny_sd1_path, tmp_path, caplog):
    source = {name: tensor.half() for name, tensor in load_tensors(tiny_sd1_path).items()}
    save_file(source, tmp_path / "m.safetensors")
    network = tiny_lora(tmp_path / "a.safetensors", "sd1", every=20)
    with caplog.at_level(logging.INFO):
        into(tmp_path / "m.safetensors", tmp_path / "out.safetensors", network, **settings)
    count = len(lora_tensors("sd1", every=20)) // 3
    line = f"written as float32 ({count} from float16); --save_precision"
    assert (line in caplog.text) == is_told


@pytest.mark.parametrize(
    ("of_model", "resolution", "prediction"),
    [
        ({"modelspec.resolution": "640x704", "modelspec.prediction_type": "epsilon"}, "640x704", "epsilon"),
        ({"modelspec.architecture": "stable-diffusion-v2-512"}, "512x512", "epsilon"),
        ({"modelspec.architecture": "stable-diffusion-v2-768-v"}, "768x768", "v"),
        ({"modelspec.resolution": "large"}, "768x768", "v"),
    ],
)
def test_the_header_says_what_the_models_header_says(of_model, resolution, prediction, tiny_sd2_path, tmp_path):
    tensors = {name: tensor for name, tensor in load_tensors(tiny_sd2_path).items() if name != V_PREDICTION_MARKER}
    save_file(tensors, tmp_path / "m.safetensors", of_model)
    network = tiny_lora(tmp_path / "a.safetensors", "sd2", every=20)
    metadata = read_header(into(tmp_path / "m.safetensors", tmp_path / "out.safetensors", network)).metadata
    assert metadata["modelspec.resolution"] == resolution
    assert metadata["modelspec.prediction_type"] == prediction


def test_the_precision_of_the_file(tiny_sd1_path, tmp_path):
    network = tiny_lora(tmp_path / "a.safetensors", "sd1", every=7)
    whole = load_tensors(into(tiny_sd1_path, tmp_path / "f.safetensors", network))
    half = load_tensors(into(tiny_sd1_path, tmp_path / "h.safetensors", network, save_precision="fp16"))
    kinds = {name: tensor.dtype for name, tensor in half.items()}
    assert kinds.pop("betas") == kinds.pop("alphas_cumprod") == torch.float32  # not of the model itself
    assert kinds.pop("cond_stage_model.transformer.text_model.embeddings.position_ids") == torch.int64
    assert set(kinds.values()) == {torch.float16}
    assert all(torch.equal(half[name], whole[name].half()) for name in kinds)


def test_the_precision_of_the_calculation(tiny_sd1_path, tmp_path):
    network = tiny_lora(tmp_path / "a.safetensors", "sd1", every=7)
    network_tensors = {part: tensor.bfloat16().double() for part, tensor in load_tensors(network).items()}
    merged = into(tiny_sd1_path, tmp_path / "c.safetensors", network, precision="bf16", save_precision="float")
    before, after = weights_by_name("sd1", tiny_sd1_path), weights_by_name("sd1", merged)
    for name in dense_changes(network):
        down, up = (network_tensors[f"{name}.lora_{side}.weight"].flatten(1) for side in ("down", "up"))
        torch.testing.assert_close(after[name], before[name].bfloat16().double() + up @ down / 2, rtol=1e-5, atol=1e-6)
    as_calculated = load_tensors(into(tiny_sd1_path, tmp_path / "b.safetensors", network, precision="bf16"))
    assert sum(tensor.dtype is torch.bfloat16 for tensor in as_calculated.values()) == len(dense_changes(network))


def test_the_report_is_about_the_written_weights(tiny_sd1_path, tmp_path, caplog):
    network = tiny_lora(tmp_path / "a.safetensors", "sd1", std=0.02)
    with caplog.at_level(logging.INFO):
        into(tiny_sd1_path, tmp_path / "f.safetensors", network)
    assert "total      278" not in caplog.text and "  0 %\n" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO):
        into(tiny_sd1_path, tmp_path / "h.safetensors", network, save_precision="fp16")
    total = next(line for line in caplog.text.splitlines() if line.startswith("total"))
    before, after = weights_by_name("sd1", tiny_sd1_path), weights_by_name("sd1", tmp_path / "h.safetensors")
    changes = dense_changes(network)
    error = sum(float((after[name] - before[name] - changes[name]).square().sum()) for name in changes)
    exact = sum(float(change.square().sum()) for change in changes.values())
    assert float(total.split()[-2]) == pytest.approx(100 * (error / exact) ** 0.5, rel=2e-2)
    assert float(total.split()[-2]) > 1 and "too coarse" not in caplog.text
    weak = tiny_lora(tmp_path / "weak.safetensors", "sd1", std=0.001, every=20)
    into(tiny_sd1_path, tmp_path / "w.safetensors", weak, save_precision="fp16")
    assert "too coarse for a change this small: use --save_precision float" in caplog.text


def test_block_weights(tiny_sdxl_path, tmp_path):
    network = tiny_lora(tmp_path / "a.safetensors", "sdxl")
    lists = ("[0,1,1,1,1,1,0.5,1,1,1,1,1]",)  # no text encoders; OUT00 at half strength
    merged = into(tiny_sdxl_path, tmp_path / "out.safetensors", network, lbws=lists)
    before, after = weights_by_name("sdxl", tiny_sdxl_path), weights_by_name("sdxl", merged)
    for name, change in dense_changes(network).items():
        factor = 0 if "lora_te" in name else 0.5 if "_output_blocks_0_" in name else 1
        torch.testing.assert_close(after[name], before[name] + factor * change, rtol=1e-5, atol=1e-6)
    key = "conditioner.embedders.1.model.transformer.resblocks.0.mlp.c_fc.weight"
    assert torch.equal(load_tensors(merged)[key], load_tensors(tiny_sdxl_path)[key])


def test_pytorch_files(tiny_sd2_path, tmp_path):
    tensors = load_tensors(tiny_sd2_path)
    entries = [entry_of(name, tensor) for name, tensor in tensors.items()]
    write_torch_file(entries, tmp_path / "m.ckpt", lambda named: {"state_dict": named, "epoch": 3, "global_step": 70})
    network = tiny_lora(tmp_path / "a.safetensors", "sd2", every=5)
    into(tmp_path / "m.ckpt", tmp_path / "out.ckpt", network)
    written = torch.load(tmp_path / "out.ckpt", weights_only=True)
    assert (written["epoch"], written["global_step"]) == (3, 70)
    reference = load_tensors(into(tiny_sd2_path, tmp_path / "out.safetensors", network))
    assert all(torch.equal(tensor, reference[name]) for name, tensor in written["state_dict"].items())
    assert written["state_dict"].keys() == reference.keys()


def test_metadata(tiny_sd2_path, tmp_path):
    network = tiny_lora(tmp_path / "a.safetensors", "sd2", every=20, metadata={"modelspec.title": "My style"})
    metadata = read_header(into(tiny_sd2_path, tmp_path / "out.safetensors", network)).metadata
    assert metadata["modelspec.title"] == "out" and metadata["modelspec.merged_from"] == "tiny_sd2, My style"
    assert metadata["modelspec.architecture"] == "stable-diffusion-v2-768-v"
    assert metadata["modelspec.prediction_type"] == "v" and not any(name.startswith("ss_") for name in metadata)
    assert not read_header(into(tiny_sd2_path, tmp_path / "n.safetensors", network, no_metadata=True)).metadata


def test_modules_of_no_layer(tiny_sd1_path, tmp_path, caplog):
    tensors = lora_tensors("sd1", every=50)
    tensors |= {key.replace("lora_unet_", "lora_unet_other_"): tensor.clone() for key, tensor in tensors.items()}
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(
        OptionError,
        match=r"has no layers for these modules: .*a.safetensors: lora_unet_other_.*; check .* --ignore_unmatched",
    ):
        into(tiny_sd1_path, tmp_path / "out.safetensors", tmp_path / "a.safetensors")
    assert not (tmp_path / "out.safetensors").exists()
    merged = into(tiny_sd1_path, tmp_path / "out.safetensors", tmp_path / "a.safetensors", ignore_unmatched=True)
    assert "left out" in caplog.text
    clean = tiny_lora(tmp_path / "b.safetensors", "sd1", every=50)
    reference = load_tensors(into(tiny_sd1_path, tmp_path / "r.safetensors", clean))
    assert all(torch.equal(tensor, reference[name]) for name, tensor in load_tensors(merged).items())


def damaged(path: Path, how: str) -> Path:
    tensors = lora_tensors("sd1", every=40)
    first = next(name for name in tensors if name.endswith("lora_up.weight"))
    match how:
        case "nan":
            tensors[first][0, 0] = float("nan")
        case "half":
            del tensors[first]
        case "shape":
            tensors[first] = torch.cat([tensors[first]] * 2)
        case "large":
            tensors[first] *= 1e6
    save_file(tensors, path)
    if how == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    return path


@pytest.mark.parametrize(
    ("how", "problem", "settings"),
    [
        ("nan", "holds NaN or infinity; leave this network out", {}),
        ("half", "is incomplete: lora_te_text_model_encoder_layers_0_self_attn_k_proj has no lora_up.weight", {}),
        ("shape", "has 64 inputs and 128 outputs there, 64 and 64 here", {}),
        ("cut", "is truncated", {}),
        ("large", "is too large for float16; use --save_precision bf16 or float", {"save_precision": "fp16"}),
    ],
)
def test_damaged_networks(tiny_sd1_path, tmp_path, how, problem, settings):
    path = damaged(tmp_path / "a.safetensors", how)
    before = path.read_bytes()
    with pytest.raises(OptionError) as error:
        into(tiny_sd1_path, tmp_path / "out.safetensors", path, **settings)
    assert problem in str(error.value)
    assert path.read_bytes() == before and [each.name for each in tmp_path.iterdir()] == ["a.safetensors"]


def test_wrong_files(tiny_sd1_path, tiny_sdxl_path, tmp_path):
    network = tiny_lora(tmp_path / "a.safetensors", "sd1", every=40)
    of_sdxl = tiny_lora(tmp_path / "x.safetensors", "sdxl", every=40)
    output = tmp_path / "out.safetensors"
    for model, networks, problem in [
        (tiny_sd1_path, (network, of_sdxl), rf"the model {tiny_sd1_path} is SD 1.x, and {of_sdxl} is for SDXL"),
        (tiny_sdxl_path, (network,), rf"{tiny_sdxl_path} is SDXL, and {network} is for SD 1.x"),
        (network, (network,), r"--sd_model: .* is a network, not a model; name it among --models"),
        (tmp_path, (network,), r"is a Diffusers folder"),
        (tiny_sd1_path, (tiny_sd1_path,), r"--models: .* is a model, no LoRA: SD 1.x checkpoint"),
        (tmp_path / "no.safetensors", (network,), r"--sd_model: .* does not exist"),
    ]:
        with pytest.raises(OptionError, match=problem):
            into(model, output, *networks)
    with pytest.raises(OptionError, match=rf"--v2: {tiny_sd1_path} is for SD 1.x; leave the flag out"):
        merge(SdMergeOptions(sd_model=str(tiny_sd1_path), save_to=str(output), models=(str(network),),
                             ratios=(1.0,), v2=True))  # fmt: skip
    (tmp_path / "link.safetensors").symlink_to(network)
    with pytest.raises(OptionError, match=r"--save_to: .*link.safetensors is one of the networks"):
        into(tiny_sd1_path, tmp_path / "link.safetensors", network)
    assert not output.exists()


def test_inputs_that_a_precision_cannot_hold_name_its_flag(tiny_sd1_path, tmp_path):
    network = tiny_lora(tmp_path / "a.safetensors", "sd1", every=20)
    large = {name: tensor * 1e6 for name, tensor in load_tensors(tiny_sd1_path).items() if tensor.is_floating_point()}
    save_file(large, tmp_path / "large.safetensors")
    with pytest.raises(OptionError, match="large.safetensors: .* is too large for float16; use --precision bf16"):
        into(tmp_path / "large.safetensors", tmp_path / "out.safetensors", network, precision="fp16")
    save_file({name: tensor * 1e6 for name, tensor in load_tensors(network).items()}, tmp_path / "b.safetensors")
    with pytest.raises(OptionError, match="b.safetensors: .* is too large for float16; use --precision bf16"):
        into(tiny_sd1_path, tmp_path / "out.safetensors", tmp_path / "b.safetensors", precision="fp16")
    huge = {name: tensor * (1 if "alpha" in name else 1e19) for name, tensor in load_tensors(network).items()}
    save_file(huge, tmp_path / "c.safetensors")
    with pytest.raises(OptionError, match="no finite number once the networks are in it; use smaller --ratios"):
        into(tiny_sd1_path, tmp_path / "out.safetensors", tmp_path / "c.safetensors", ratios=(1e4,))


def _changed(part, change):
    return lambda tensors: {key: change(tensor) if key.endswith(part) else tensor for key, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_changed("alpha", lambda alpha: alpha * float("nan")), "alpha of .* is nan, no finite number"),
        (_changed("alpha", lambda alpha: alpha * 1j), "alpha of .* is no single number"),
        (
            _changed("lora_down.weight", lambda down: down.movedim(1, -1).contiguous()),
            "is damaged: .* don't fit together",
        ),
        (_changed("lora_down.weight", lambda down: down.flatten(1)), r"is for a weight of \[.*there, of \[.*here"),
        (_changed("lora_up.weight", lambda up: up.to(torch.complex64)), "lora_up.weight of .* is of type C64"),
    ],
)
def test_damaged_networks_are_refused_before_the_work(change, said, tmp_path, tiny_sd1_path):
    """Each as the network module refuses it."""
    save_file(change(lora_tensors("sd1", every=5)), tmp_path / "a.safetensors")
    with pytest.raises(OptionError, match=rf"a.safetensors.*{said}") as error:
        into(tiny_sd1_path, tmp_path / "out.safetensors", tmp_path / "a.safetensors")
    assert not isinstance(error.value, NonFiniteError) and not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("key", ["scaled_fp8", "model.diffusion_model.out.2.scale_weight", "x.weight_scale"])
def test_scaled_weights_are_refused(key, tmp_path, tiny_sd1_path, capsys):
    """Their numbers alone, without the scales, would be merged into nonsense, silently."""
    scaled, network = tmp_path / "scaled.safetensors", tiny_lora(tmp_path / "a.safetensors", "sd1", every=40)
    save_file(load_tensors(tiny_sd1_path) | {key: torch.ones(1)}, scaled)
    out = tmp_path / "out.safetensors"
    said = rf"scaled.safetensors holds float8 weights with scales of their own \({key}\).*; convert it to fp16 first"
    with pytest.raises(OptionError, match=f"--sd_model: .*{said}"):
        into(scaled, out, network)
    for tool, words in (
        (merge_models, ["--models", tiny_sd1_path, scaled, "--output", out]),
        (extract_lora_from_models, ["--model_org", tiny_sd1_path, "--model_tuned", scaled, "--save_to", out]),
    ):
        assert tool.TOOL.run([*map(str, words)]) == 2
        assert "scaled.safetensors holds float8 weights with scales" in capsys.readouterr().err
    assert not out.exists()
    assert verify_model.TOOL.run([str(scaled), "--header_only"]) == 2
    assert f"have scales of their own ({key})" in capsys.readouterr().err
