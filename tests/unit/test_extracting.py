"""A LoRA from two models: the difference of tiny ones, decomposed in float64."""

import functools

import pytest
import torch
from safetensors import safe_open

from library.checkpoints.safetensors_io import save_file
from library.checkpoints.weights import load_tensors, open_weights
from library.options import OptionError
from networks import extract_lora_from_models
from networks.weights.checkpoint_layers import checkpoint_layers
from networks.weights.stored_results import StoredResults
from tests.tiny_loras import dense_changes
from tests.tiny_models import tiny_sd_checkpoint, tiny_sdxl_checkpoint

KINDS = ["sd1", "sd2", "sdxl"]


@functools.cache
def tiny(folder, kind):
    path = folder / f"{kind}.safetensors"
    if not path.exists():
        tiny_sdxl_checkpoint(path) if kind == "sdxl" else tiny_sd_checkpoint(path, kind)
    return path


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """kind, and how much text encoders differ -> (original, tuned); every layer of the U-Net differs."""
    folder = tmp_path_factory.mktemp("models")

    @functools.cache
    def make(kind, text=0.05):
        tensors = load_tensors(tiny(folder, kind))
        generator = torch.Generator().manual_seed(5)
        for key, tensor in tensors.items():
            if tensor.is_floating_point() and tensor.ndim > 1 and "embedding" not in key and "first_stage" not in key:
                change = torch.rand(tensor.shape, generator=generator) * 2 - 1
                tensor.add_(change, alpha=0.05 if "diffusion_model" in key else text)
        tuned = folder / f"{kind}-{text}.safetensors"
        save_file(tensors, tuned)
        return tiny(folder, kind), tuned

    return make


def extracted(models, tmp_path, *flags, name="out.safetensors"):
    output = tmp_path / "new" / name
    command = ["--model_org", models[0], "--model_tuned", models[1], "--save_to", output, *flags]
    assert extract_lora_from_models.TOOL.run([*map(str, command)]) == 0
    return output


def differences(models, kind, *, has_convs):
    with open_weights(models[0]) as org, open_weights(models[1]) as tuned:
        layers = checkpoint_layers(org.shapes, kind)
        return {
            name: (layer.weight(tuned).double() - layer.weight(org).double()).flatten(1)
            for name, layer in layers.items()
            if has_convs or not layer.is_in_conv_block
        }


def left_over(matrix, rank):
    return float(torch.linalg.svdvals(matrix)[rank:].norm())


def metadata(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


@pytest.mark.parametrize("method", ["exact", "randomized"])
@pytest.mark.parametrize("kind", KINDS)
def test_lora_is_the_best_one_of_its_rank(models, kind, method, tmp_path):
    flags = ["--dim", 8, "--conv_dim", 4, "--clamp_quantile", 1, "--svd_method", method]
    output = extracted(models(kind), tmp_path, *flags)
    wanted, found = differences(models(kind), kind, has_convs=True), dense_changes(output)
    tensors = load_tensors(output)
    assert wanted.keys() == found.keys()
    for name, difference in wanted.items():
        down = tensors[f"{name}.lora_down.weight"]
        rank = 4 if down.ndim == 4 and down.shape[2:] == (3, 3) else 8
        assert len(down) == rank and tensors[f"{name}.alpha"].dtype == torch.int64
        best = left_over(difference, rank)
        assert float((difference - found[name]).norm()) <= best * (1.002 if method == "exact" else 1.02) + 1e-6


def test_numbers_are_limited_to_a_quantile_as_the_trade_does(models, tmp_path, caplog):
    with caplog.at_level("INFO"):
        output = extracted(models("sd1"), tmp_path, "--dim", 8, "--plot", tmp_path / "p.png")
    tensors = load_tensors(output)
    wanted = differences(models("sd1"), "sd1", has_convs=False)
    for name in wanted:
        numbers = torch.cat([tensors[f"{name}.lora_{part}.weight"].flatten() for part in ("up", "down")])
        assert float((numbers == numbers.max()).double().mean()) == pytest.approx(0.01, abs=2 / len(numbers))
        assert float(numbers.min()) >= -float(numbers.max())  # of values, not of sizes: below there may be more
    assert "the rank alone costs" in caplog.text and "--clamp_quantile 0.99" in caplog.text
    found = dense_changes(output)
    lost = sum(float((wanted[name] - found[name]).square().sum()) for name in wanted)
    total = (lost / sum(float(each.square().sum()) for each in wanted.values())) ** 0.5
    (line,) = [line for line in caplog.text.splitlines() if line.startswith("total")]
    assert float(line.split()[-2]) == pytest.approx(100 * total, rel=0.01)
    assert (tmp_path / "p.png").exists()


@pytest.mark.parametrize(("min_diff", "is_kept"), [(None, False), (0.001, True), (0.1, False)])
def test_text_encoders_that_hardly_differ_are_left_out_and_the_measure_is_told(
    models, min_diff, is_kept, tmp_path, caplog
):
    flags = [] if min_diff is None else ["--min_diff", min_diff]
    with caplog.at_level("INFO"):
        output = extracted(models("sd1", text=0.005), tmp_path, "--dim", 2, *flags)
    assert any(key.startswith("lora_te") for key in load_tensors(output)) == is_kept
    assert "a largest difference of 0.005" in caplog.text
    assert ("they are part of the LoRA" if is_kept else "they are left out") in caplog.text


def test_metadata(models, tmp_path):
    notes = metadata(extracted(models("sd2"), tmp_path, "--dim", 2, "--conv_dim", 3, "--v2", "--v_parameterization"))
    assert notes["ss_v2"] == "True" and notes["ss_base_model_version"] == "sd_v2_v"
    assert (notes["ss_network_dim"], notes["ss_network_alpha"]) == ("2", "2.0")
    assert notes["ss_network_args"] == '{"conv_dim": "3", "conv_alpha": "3.0"}'
    assert notes["ss_network_module"] == "networks.lora"
    assert notes["modelspec.architecture"] == "stable-diffusion-v2-768-v/lora"
    assert notes["modelspec.title"] == "out" and "sshs_model_hash" in notes


def test_old_form_of_the_flag_for_velocity_means_what_it_says(models, tmp_path):
    flags = ["--dim", 2, "--no_metadata", "--v_parameterization", "False"]
    notes = metadata(extracted(models("sd2"), tmp_path, *flags))
    assert notes["ss_base_model_version"] == "sd_v2" and "modelspec.title" not in notes


def test_precisions(models, tmp_path):
    whole = dense_changes(extracted(models("sd1"), tmp_path, "--dim", 4, "--clamp_quantile", 1))
    flags = ["--dim", 4, "--clamp_quantile", 1, "--load_precision", "bf16", "--save_precision", "fp16"]
    output = extracted(models("sd1"), tmp_path, *flags, name="b.safetensors")
    assert {tensor.dtype for tensor in load_tensors(output).values()} == {torch.float16}
    rounded = dense_changes(output)
    distance = max(float((whole[name] - rounded[name]).norm() / whole[name].norm()) for name in whole)
    assert 1e-3 < distance < 0.5


def test_devices_of_the_models_are_told_to_have_no_effect(models, tmp_path, caplog):
    extracted(models("sd1"), tmp_path, "--dim", 1, "--load_original_model_to", "cuda", "--load_tuned_model_to", "cpu")
    assert "--load_original_model_to: no effect" in caplog.text and "--load_tuned_model_to: no effect" in caplog.text


def refused(capsys, tmp_path, *command):
    output = tmp_path / "out.safetensors"
    assert extract_lora_from_models.TOOL.run([*map(str, command), "--save_to", str(output)]) == 2
    assert not output.exists()
    return capsys.readouterr().err


def test_models_that_don_t_fit_together_are_refused(models, tmp_path, capsys):
    org, tuned = models("sd1")
    other = models("sdxl")[1]
    said = refused(capsys, tmp_path, "--model_org", org, "--model_tuned", other)
    assert "--model_tuned" in said and "is SDXL, and" in said
    assert "--v2: the models are SD 1.x" in refused(
        capsys, tmp_path, "--model_org", org, "--model_tuned", tuned, "--v2"
    )
    assert "--sdxl" in refused(capsys, tmp_path, "--model_org", org, "--model_tuned", tuned, "--sdxl", "--v2")
    assert "is equal to the other model" in refused(capsys, tmp_path, "--model_org", org, "--model_tuned", org)
    assert "does not exist" in refused(capsys, tmp_path, "--model_org", org, "--model_tuned", tmp_path / "x.ckpt")
    assert "is a folder" in refused(capsys, tmp_path, "--model_org", tmp_path, "--model_tuned", tuned)


def test_layers_of_other_sizes_and_nan_are_refused(models, tmp_path, capsys, caplog):
    org, tuned = models("sd1")
    tensors = load_tensors(tuned)
    name = next(key for key in tensors if key.endswith("ff.net.2.weight"))
    odd = tensors | {name: tensors[name][:, :-1].clone()}
    save_file(odd, tmp_path / "odd.safetensors")
    command = ["--model_org", org, "--model_tuned", tmp_path / "odd.safetensors", "--dim", 1]
    assert "1 layer of the two models don't match" in refused(capsys, tmp_path, *command)
    output = tmp_path / "left.safetensors"
    run = [*map(str, command), "--ignore_unmatched", "--save_to", str(output)]
    assert extract_lora_from_models.TOOL.run(run) == 0 and "left out" in caplog.text
    tensors[name].view(-1)[0] = float("nan")
    torch.save(tensors, tmp_path / "nan.ckpt")
    command = ["--model_org", org, "--model_tuned", tmp_path / "nan.ckpt"]
    assert "holds NaN or infinity" in refused(capsys, tmp_path, *command)


def test_output_that_is_a_model_is_refused(models, capsys):
    org, tuned = models("sd1")
    arguments = ["--model_org", str(org), "--model_tuned", str(tuned), "--save_to", str(org)]
    assert extract_lora_from_models.TOOL.run(arguments) == 2
    assert "which would be replaced" in capsys.readouterr().err


def test_models_that_a_precision_cannot_hold_name_its_flag(models, tmp_path, capsys):
    org, tuned = models("sd1")
    large = {name: tensor * 1e6 for name, tensor in load_tensors(tuned).items() if tensor.is_floating_point()}
    save_file(large, tmp_path / "large.safetensors")
    command = ["--model_org", org, "--model_tuned", tmp_path / "large.safetensors", "--save_to", tmp_path / "x.pt"]
    assert extract_lora_from_models.TOOL.run([*map(str, command), "--load_precision", "fp16"]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert str(tmp_path / "large.safetensors") in last and last.endswith(
        "is too large for float16; use --load_precision bf16 or float"
    )


def test_a_disk_that_fills_is_one_sentence(tmp_path):
    said = r"can't take more results \(No space left on device\); free some space"
    with pytest.raises(OptionError, match=said), StoredResults(tmp_path) as store:
        store._file.close()
        store._file = open("/dev/full", "w+b")  # noqa: SIM115 - as a disk is in the middle of the work
        store.add("a", torch.ones(4))
