"""LoRA at other ranks, against dense singular value decompositions in float64."""

import pytest
import torch
from safetensors import safe_open

from library.checkpoints.safetensors_io import save_file, sshs_hashes
from library.checkpoints.weights import load_tensors
from networks import resize_lora
from tests.tiny_loras import dense_changes, lora_tensors, tiny_lora


def resized(source, tmp_path, *flags, name="out.safetensors"):
    output = tmp_path / name
    assert resize_lora.TOOL.run(["--model", str(source), "--save_to", str(output), *map(str, flags)]) == 0
    return output


def best(matrix, rank):
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


def metadata(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def rank_of(tensors, name):
    return len(tensors[f"{name}.lora_down.weight"])


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_fixed_rank_keeps_the_best_part_of_each_change(kind, tmp_path):
    source = tiny_lora(tmp_path / "in.safetensors", kind, rank=6, every=5, metadata={"ss_training_comment": "mine"})
    output = resized(source, tmp_path, "--new_rank", 3)
    before, after, tensors = dense_changes(source), dense_changes(output), load_tensors(output)
    assert before.keys() == after.keys()
    for name, change in after.items():
        torch.testing.assert_close(change, best(before[name], 3), rtol=1e-4, atol=1e-5)
        assert tensors[f"{name}.alpha"] == pytest.approx(2.0 / 6 * 3)
        down, up = tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"]
        assert (len(down), up.shape[1], down.ndim) == (3, 3, up.ndim)
    notes = metadata(output)
    assert notes["ss_training_comment"] == "dimension is resized from 6 to 3; mine"
    assert (notes["ss_network_dim"], notes["ss_network_alpha"]) == ("3", "1.0")
    assert notes["ss_base_model_version"] == metadata(source)["ss_base_model_version"]
    assert (notes["sshs_model_hash"], notes["sshs_legacy_hash"]) == sshs_hashes(tensors, notes)


@pytest.mark.parametrize(
    ("method", "param"), [("sv_ratio", 2), ("sv_ratio", 1000), ("sv_fro", 0.8), ("sv_cumulative", 0.6)]
)
@pytest.mark.parametrize("exact", [False, True])
def test_dynamic_rules_choose_a_rank_for_each_module(method, param, exact, tmp_path):
    source = tiny_lora(tmp_path / "in.safetensors", "sd1", rank=6, every=7)
    flags = ["--dynamic_method", method, "--dynamic_param", param, *(["--exact_rank"] if exact else [])]
    output = resized(source, tmp_path, "--new_rank", 5, *flags)
    before, after, tensors = dense_changes(source), dense_changes(output), load_tensors(output)
    for name, change in before.items():
        values = torch.linalg.svdvals(change)[:6]
        if method == "sv_ratio":
            textbook = int((values > values[0] / param).sum())
        else:
            sizes, share = (values**2, param**2) if method == "sv_fro" else (values, param)
            textbook = next(k for k in range(1, 7) if sizes[:k].sum() / sizes.sum() >= share)
        rank = min(textbook if exact else textbook + 1, 5)
        assert rank_of(tensors, name) == rank
        torch.testing.assert_close(after[name], best(change, rank), rtol=1e-4, atol=1e-5)
    notes = metadata(output)
    assert (notes["ss_network_dim"], notes["ss_network_alpha"]) == ("Dynamic", "Dynamic")
    assert notes["ss_training_comment"] == f"Dynamic resize with {method}: {float(param)} from 6; "


def test_convolutions_can_have_a_rank_of_their_own(tmp_path):
    source = tiny_lora(tmp_path / "in.safetensors", "sd1", rank=6, every=3)
    output = resized(source, tmp_path, "--new_rank", 4, "--new_conv_rank", 2)
    tensors = load_tensors(output)
    ranks = {tuple(down.shape[2:]): len(down) for key, down in tensors.items() if key.endswith("lora_down.weight")}
    assert ranks == {(): 4, (1, 1): 4, (3, 3): 2}
    assert metadata(output)["ss_training_comment"] == "dimension is resized from 6 to 4 (conv: 2); "


def test_larger_rank_changes_nothing_and_small_layers_get_what_they_can_hold(tmp_path, caplog):
    source = tiny_lora(tmp_path / "in.safetensors", "sd1", rank=4, every=9)
    with caplog.at_level("INFO"):
        output = resized(source, tmp_path, "--new_rank", 48)
    before, after, tensors = dense_changes(source), dense_changes(output), load_tensors(output)
    for name, change in after.items():
        torch.testing.assert_close(change, before[name], rtol=1e-4, atol=1e-5)
        assert rank_of(tensors, name) == min(48, *before[name].shape)
    assert "no larger than the rank asked for" in caplog.text


def test_without_alpha_the_scale_is_one_and_other_spellings_get_the_trades_names(tmp_path):
    down, up = torch.randn(4, 20), torch.randn(10, 4)
    save_file({"lora_unet_x.lora_A.weight": down, "lora_unet_x.lora_B.weight": up}, tmp_path / "in.safetensors")
    tensors = load_tensors(resized(tmp_path / "in.safetensors", tmp_path, "--new_rank", 2, name="out.pt"))
    assert sorted(tensors) == [f"lora_unet_x.{part}" for part in ("alpha", "lora_down.weight", "lora_up.weight")]
    assert tensors["lora_unet_x.alpha"] == 2
    product = tensors["lora_unet_x.lora_up.weight"] @ tensors["lora_unet_x.lora_down.weight"]
    torch.testing.assert_close(product, best(up @ down, 2), rtol=1e-4, atol=1e-4)


def test_what_is_no_plain_lora_is_refused_or_copied(tmp_path, capsys, caplog):
    tensors = lora_tensors("sd1", every=20) | {"lora_unet_y.hada_w1_a": torch.ones(2, 2), "note": torch.ones(3)}
    save_file(tensors, tmp_path / "in.safetensors")
    arguments = ["--model", str(tmp_path / "in.safetensors"), "--save_to", str(tmp_path / "out.safetensors")]
    assert resize_lora.TOOL.run(arguments) == 2
    assert "1 module is no plain LoRA (lora_unet_y)" in capsys.readouterr().err
    assert not (tmp_path / "out.safetensors").exists()
    assert resize_lora.TOOL.run([*arguments, "--ignore_unmatched", "--save_precision", "fp16"]) == 0
    copied = load_tensors(tmp_path / "out.safetensors")
    assert torch.equal(copied["lora_unet_y.hada_w1_a"], torch.ones(2, 2).half()) and "note" in copied
    assert {tensor.dtype for tensor in copied.values()} == {torch.float16}
    assert "copied as they are" in caplog.text


def test_a_model_is_no_lora_and_long_lists_are_cut(tiny_sd1_path, tmp_path, capsys):
    out = str(tmp_path / "out.safetensors")
    assert resize_lora.TOOL.run(["--model", str(tiny_sd1_path), "--save_to", out]) == 2
    assert "is a model, no LoRA: SD 1.x checkpoint" in capsys.readouterr().err
    tensors = lora_tensors("sd1", every=20) | {f"lora_unet_{x}.hada_w1_a": torch.ones(2, 2) for x in "abcdef"}
    save_file(tensors, tmp_path / "in.safetensors")
    assert resize_lora.TOOL.run(["--model", str(tmp_path / "in.safetensors"), "--save_to", out]) == 2
    assert "(lora_unet_a, lora_unet_b, lora_unet_c and 3 more)" in capsys.readouterr().err


def test_a_module_of_next_to_nothing_is_not_the_worst(tmp_path, caplog):
    tensors = lora_tensors("sd1", rank=6, every=20)
    empty = next(iter(tensors)).partition(".")[0]
    tensors[f"{empty}.lora_up.weight"] = tensors[f"{empty}.lora_up.weight"] * 1e-9
    save_file(tensors, tmp_path / "in.safetensors")
    with caplog.at_level("INFO"):
        after = load_tensors(resized(tmp_path / "in.safetensors", tmp_path, "--new_rank", 6))
    assert rank_of(after, empty) == 1
    assert "largest error of a module" not in caplog.text or f"({empty})" not in caplog.text


def test_verbose_and_report_say_what_is_kept(tmp_path, caplog):
    source = tiny_lora(tmp_path / "in.safetensors", "sd1", rank=6, every=15)
    before = dense_changes(source)
    with caplog.at_level("INFO"):
        after = dense_changes(resized(source, tmp_path, "--new_rank", 3, "--verbose", "--plot", tmp_path / "p.png"))
    assert caplog.text.count("fro retained:") == len(before)
    lost = sum(float((before[name] - after[name]).square().sum()) for name in before)
    total = (lost / sum(float(change.square().sum()) for change in before.values())) ** 0.5
    (line,) = [line for line in caplog.text.splitlines() if line.startswith("total")]
    assert float(line.split()[-2]) == pytest.approx(100 * total, rel=0.01)
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--new_rank", "0"], "--new_rank: 0 is no rank"),
        (["--dynamic_method", "sv_fro"], "--dynamic_param: sv_fro needs it"),
        (["--dynamic_method", "sv_fro", "--dynamic_param", "0"], "--dynamic_param: sv_fro needs it"),
        (["--dynamic_method", "sv_fro", "--dynamic_param", "1.5"], "--dynamic_param: 1.5 is no share"),
        (["--dynamic_method", "sv_ratio", "--dynamic_param", "-2"], "--dynamic_param: -2 is no ratio"),
        (["--save_to", "x.bin"], "--save_to: x.bin does not end in"),
        (["--save_to", "x.safetensors/"], "--save_to: x.safetensors is a folder"),
        (["--plot", "x.jpg"], "--plot: x.jpg does not end in .png"),
        (["--device", "nonsense"], "--device: 'nonsense' can't be used"),
        (["--model", "missing.safetensors"], "missing.safetensors does not exist"),
    ],
)
def test_mistakes_are_one_sentence(flags, message, tmp_path, capsys):
    source = tiny_lora(tmp_path / "in.safetensors", "sd1", every=30)
    output = tmp_path / "out.safetensors"
    assert resize_lora.TOOL.run(["--model", str(source), "--save_to", str(output), *flags]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") <= 2
    assert not output.exists() and sorted(path.name for path in tmp_path.iterdir()) == ["in.safetensors"]


def test_output_that_is_the_input_and_nan_are_refused(tmp_path, capsys):
    source = tiny_lora(tmp_path / "in.safetensors", "sd1", every=30)
    content = source.read_bytes()
    assert resize_lora.TOOL.run(["--model", str(source), "--save_to", str(source)]) == 2
    assert "which would be replaced" in capsys.readouterr().err and source.read_bytes() == content
    tensors = load_tensors(source)
    tensors[next(key for key in tensors if key.endswith("lora_up.weight"))].view(-1)[0] = float("nan")
    torch.save(tensors, tmp_path / "nan.pt")
    output = tmp_path / "out.safetensors"
    assert resize_lora.TOOL.run(["--model", str(tmp_path / "nan.pt"), "--save_to", str(output)]) == 2
    assert "holds NaN or infinity" in capsys.readouterr().err and not output.exists()


def test_header_has_the_ranks_that_there_are(tmp_path):
    """Not the rank asked for, which no layer of a tiny model can have."""
    output = resized(tiny_lora(tmp_path / "in.safetensors", "sd1", rank=6, every=5), tmp_path, "--new_rank", 100000)
    notes, tensors = metadata(output), load_tensors(output)
    ranks = {len(tensor) for key, tensor in tensors.items() if key.endswith("lora_down.weight")}
    assert len(ranks) > 1 and max(ranks) < 1000
    assert (notes["ss_network_dim"], notes["ss_network_alpha"]) == ("Dynamic", "Dynamic")
    assert notes["ss_training_comment"].startswith("dimension is resized from 6 to ")
    assert "100000" not in notes["ss_training_comment"]


def test_the_table_counts_the_rounding_of_alpha(tmp_path, caplog):
    source = tiny_lora(tmp_path / "in.safetensors", "sd1", alpha=1.7, every=20)
    before, after = (dense_changes(path) for path in (source, resized(source, tmp_path, "--save_precision", "bf16")))
    lost = sum(float((before[name] - after[name]).square().sum()) for name in before)
    total = (lost / sum(float(change.square().sum()) for change in before.values())) ** 0.5
    (line,) = [line for line in caplog.text.splitlines() if line.startswith("total")]
    assert float(line.split()[-2]) == pytest.approx(100 * total, rel=0.02)
