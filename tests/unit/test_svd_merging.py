"""LoRA files merged into one of a chosen rank, against dense sums in float64."""

import json

import pytest
import torch
from safetensors import safe_open

from library.checkpoints.safetensors_io import save_file
from library.checkpoints.weights import load_tensors
from networks import svd_merge_lora
from networks.weights.block_weights import slot_of
from tests.tiny_loras import dense_changes, tiny_lora


def merged(sources, ratios, output, *flags):
    command = ["--models", *sources, "--ratios", *ratios, "--save_to", output, *flags]
    return svd_merge_lora.TOOL.run([*map(str, command)])


def dense_sum(sources, weight_of):
    total = {}
    for number, source in enumerate(sources):
        for name, change in dense_changes(source).items():
            total[name] = total.get(name, 0) + weight_of(number, name) * change
    return total


def best(matrix, rank):
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


@pytest.fixture
def two(tmp_path):
    """Of different ranks, alphas and modules."""
    first = tiny_lora(tmp_path / "a.safetensors", "sd1", rank=4, alpha=2.0, every=3)
    return first, tiny_lora(tmp_path / "b.safetensors", "sd1", rank=7, alpha=None, every=4, seed=2)


def test_result_is_the_best_one_for_the_weighted_sum(two, tmp_path):
    output = tmp_path / "out.safetensors"
    flags = ["--new_rank", 5, "--new_conv_rank", 3, "--clamp_quantile", 1]
    assert merged(two, [0.7, -0.4], output, *flags) == 0
    wanted, found, tensors = dense_sum(two, lambda i, _: (0.7, -0.4)[i]), dense_changes(output), load_tensors(output)
    assert wanted.keys() == found.keys()
    for name, change in wanted.items():
        down = tensors[f"{name}.lora_down.weight"]
        rank = 3 if down.ndim == 4 and down.shape[2:] == (3, 3) else 5
        assert len(down) == rank == tensors[f"{name}.alpha"]
        torch.testing.assert_close(found[name], best(change, rank), rtol=1e-4, atol=1e-5)
    with safe_open(output, "pt") as file:
        notes = file.metadata()
    assert (notes["ss_network_dim"], notes["ss_network_alpha"]) == ("5", "5")
    assert json.loads(notes["ss_network_args"]) == {"conv_dim": 3, "conv_alpha": 3}
    assert notes["ss_base_model_version"] == "sd_v1" and notes["modelspec.merged_from"] == "a, b"


@pytest.mark.parametrize(("flags", "warns"), [([], True), (["--clamp_quantile", 1], False), (["--new_rank", 1], False)])
def test_a_warning_where_limiting_numbers_is_most_of_the_error(flags, warns, two, tmp_path, caplog):
    assert merged(two, [0.7, 0.4], tmp_path / "out.safetensors", "--new_rank", 11, "--new_conv_rank", 11, *flags) == 0
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert any("--clamp_quantile 1" in text and "the rank alone costs" in text for text in warnings) == warns


def test_ranks_that_hold_everything_lose_nothing(two, tmp_path):
    output = tmp_path / "out.pt"
    assert merged(two, [1, 1], output, "--new_rank", 16, "--clamp_quantile", 1, "--no_metadata") == 0
    wanted, found = dense_sum(two, lambda *_: 1.0), dense_changes(output)
    for name, change in wanted.items():
        torch.testing.assert_close(found[name], change, rtol=1e-4, atol=1e-5)


def test_block_weights(two, tmp_path):
    weights = [0.0] + [0.5] * 8 + [2.0] * 8
    lists = [json.dumps(weights), json.dumps([1] * 17)]
    output = tmp_path / "out.safetensors"
    assert merged(two, [1, 1], output, "--new_rank", 16, "--clamp_quantile", 1, "--lbws", *lists) == 0
    slots = ("BASE", "IN01", "IN02", "IN04", "IN05", "IN07", "IN08", "MID", *(f"OUT{n:02}" for n in range(3, 12)))
    by_slot = dict(zip(slots, weights, strict=True))
    wanted = dense_sum(two, lambda i, name: 1.0 if i else by_slot.get(slot_of(name), 1.0))
    for name, change in dense_changes(output).items():
        torch.testing.assert_close(change, wanted[name], rtol=1e-4, atol=1e-5)


def test_clamping_and_its_cost(two, tmp_path, caplog):
    output = tmp_path / "out.safetensors"
    with caplog.at_level("INFO"):
        assert merged(two, [1, 1], output, "--new_rank", 5, "--plot", tmp_path / "p.png") == 0
    tensors = load_tensors(output)
    for name in dense_changes(output):
        numbers = torch.cat([tensors[f"{name}.lora_{part}.weight"].flatten() for part in ("up", "down")])
        assert float(numbers.min()) >= -float(numbers.max())
        assert int((numbers == numbers.max()).sum()) > 1
    assert "the rank alone costs" in caplog.text and (tmp_path / "p.png").exists()


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_precisions(two, precision, tmp_path):
    output = tmp_path / "out.safetensors"
    assert merged(two, [1, 1], output, "--new_rank", 16, "--clamp_quantile", 1, "--precision", precision) == 0
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    assert {tensor.dtype for tensor in load_tensors(output).values()} == {dtype}
    wanted = dense_sum(two, lambda *_: 1.0)
    for name, change in dense_changes(output).items():
        assert float((change - wanted[name]).norm() / wanted[name].norm()) < (2e-3 if precision == "fp16" else 2e-2)


def test_mistakes_are_one_sentence(two, tmp_path, capsys):
    output = tmp_path / "out.safetensors"
    assert merged(two, [1], output) == 2 and "--ratios: 1 ratio for 2 models" in capsys.readouterr().err
    assert merged(two, [1, 1], two[0]) == 2 and "which would be replaced" in capsys.readouterr().err
    other = tiny_lora(tmp_path / "xl.safetensors", "sdxl", every=10)
    assert merged([two[0], other], [1, 1], output) == 2 and "SDXL" in capsys.readouterr().err
    save_file({"lora_unet_x.hada_w1_a": torch.ones(2, 2)}, tmp_path / "loha.safetensors")
    sources = [two[0], tmp_path / "loha.safetensors"]
    assert merged(sources, [1, 1], output) == 2 and "lora_unet_x" in capsys.readouterr().err
    assert not output.exists()
    assert merged(sources, [1, 1], output, "--ignore_unmatched") == 0 and output.exists()


@pytest.mark.parametrize(
    ("ratio", "flags", "said"),
    [
        (
            1,
            ["--clamp_quantile", "0.5"],
            "--clamp_quantile: 0.5 would leave nothing of most numbers; use",
        ),
        (1, ["--clamp_quantile", "1.5"], "--clamp_quantile: 1.5 would"),
        ("1e40", [], "--ratios: 1e+40 is no strength; use numbers up to 10000"),
        (1, ["--lbws", f"[1e40{',1' * 16}]"], "holds what is no finite number up to 10000"),
        (1, ["--lbws", "[" * 100000], "is no list of numbers"),
    ],
)
def test_numbers_out_of_range(ratio, flags, said, tmp_path, capsys):
    source, output = tiny_lora(tmp_path / "in.safetensors", "sd1", every=40), tmp_path / "out.safetensors"
    assert merged([source], [ratio], output, *flags) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not output.exists()
