"""LoRA files merged with each other: the trade's formulas, and the exact sum, in dense float64."""

import logging

import pytest
import torch
from safetensors.torch import save_file

from library.checkpoints.safetensors_io import read_header, sshs_hashes
from library.checkpoints.weights import load_tensors
from library.options import OptionError
from networks.merge_lora import merge
from networks.merge_lora_old import merge_as_before
from networks.weights.merge_options import MergeOptions, OldMergeOptions, SdMergeOptions
from tests.tiny_loras import dense_changes, layer_shapes, lora_tensors, tiny_lora

CONV = "lora_unet_down_blocks_0_resnets_0_conv1"


def together(output, *networks, ratios=None, group=SdMergeOptions, **settings):
    paths = tuple(map(str, networks))
    merge(group(save_to=str(output), models=paths, ratios=tuple(ratios or (1.0,) * len(paths)), **settings))
    return output


@pytest.fixture
def two(tmp_path):
    """Of one rank, with other alphas; each stands on layers that the other leaves out."""
    first = tiny_lora(tmp_path / "a.safetensors", "sd1", alpha=2.0, every=3)
    return first, tiny_lora(tmp_path / "b.safetensors", "sd1", seed=2, alpha=8.0, every=4)


def by_formula(paths, ratios, *, concat=False):
    """Module -> (down, up) by the trade's formula, in float64."""
    found, bases = {}, {}
    files = [load_tensors(path) for path in paths]
    for file, ratio in zip(files, ratios, strict=True):
        for name in {key.partition(".")[0] for key in file}:
            base = next(each for each in files if f"{name}.alpha" in each)[f"{name}.alpha"].double()
            bases[name] = float(base)
            scale = float((file[f"{name}.alpha"].double() / base).sqrt() * ratio)
            down = file[f"{name}.lora_down.weight"].double() * scale
            up = file[f"{name}.lora_up.weight"].double() * abs(scale)
            if name in found and concat:
                found[name] = torch.cat([found[name][0], down]), torch.cat([found[name][1], up], dim=1)
            else:
                found[name] = (found[name][0] + down, found[name][1] + up) if name in found else (down, up)
    return found, bases


@pytest.mark.parametrize("concat", [False, True])
def test_the_trades_formula(two, tmp_path, concat):
    merged = load_tensors(together(tmp_path / "out.safetensors", *two, ratios=(0.6, -0.5), concat=concat))
    expected, bases = by_formula(two, (0.6, -0.5), concat=concat)
    assert set(bases.values()) == {2.0, 8.0}
    assert merged.keys() == {f"{name}.{part}" for name in expected for part in ("alpha", "lora_down.weight",
                                                                                "lora_up.weight")}  # fmt: skip
    for name, (down, up) in expected.items():
        torch.testing.assert_close(merged[f"{name}.lora_down.weight"].double(), down, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(merged[f"{name}.lora_up.weight"].double(), up, rtol=1e-6, atol=1e-7)
        assert merged[f"{name}.alpha"].dtype is torch.float32 and float(merged[f"{name}.alpha"]) == bases[name]


def test_one_network_comes_out_at_its_ratio_twice(two, tmp_path):
    before, after = dense_changes(two[0]), dense_changes(together(tmp_path / "o.safetensors", two[0], ratios=(0.5,)))
    for name, change in before.items():
        torch.testing.assert_close(after[name], 0.25 * change, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shuffle", [False, True])
def test_the_exact_sum(tmp_path, shuffle):
    paths = [
        tiny_lora(tmp_path / "a.safetensors", "sd1", alpha=2.0, every=3),
        tiny_lora(tmp_path / "b.safetensors", "sd1", seed=2, rank=7, alpha=None, every=6, dtype=torch.bfloat16),
        tiny_lora(tmp_path / "c.safetensors", "sd1", seed=3, rank=1, alpha=-3.0, every=2, dtype=torch.float16),
    ]
    ratios = (0.6, -0.5, 1.5)
    merged = together(tmp_path / "out.safetensors", *paths, ratios=ratios, exact=True, shuffle=shuffle)
    sums = {name: 0.0 for name in layer_shapes("sd1")}
    for path, ratio in zip(paths, ratios, strict=True):
        for name, change in dense_changes(path).items():
            sums[name] = sums[name] + ratio * change
    after = dense_changes(merged)
    assert after.keys() == {name for name, change in sums.items() if isinstance(change, torch.Tensor)}
    for name, change in after.items():
        torch.testing.assert_close(change, sums[name], rtol=1e-5, atol=1e-6)
    tensors = load_tensors(merged)
    first = next(iter(layer_shapes("sd1")))  # of all three
    assert tensors[f"{first}.lora_down.weight"].shape[0] == float(tensors[f"{first}.alpha"]) == 12


def test_shuffled_ranks_stay_together(two, tmp_path):
    plain = together(tmp_path / "p.safetensors", *two, concat=True)
    first, again = (
        together(tmp_path / f"{name}.safetensors", *two, concat=True, shuffle=True) for name in ("s", "t")
    )  # fmt: skip
    one, other, same = map(load_tensors, (plain, first, again))
    assert all(torch.equal(other[name], same[name]) for name in other)
    assert any(not torch.equal(one[name], other[name]) for name in one)
    shuffled = dense_changes(first)
    for name, change in dense_changes(plain).items():
        torch.testing.assert_close(shuffled[name], change, rtol=1e-5, atol=1e-6)


def test_the_report(two, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        merged = together(tmp_path / "out.safetensors", *two, ratios=(0.5, 0.5))
    exact = {name: 0.5 * change for name, change in dense_changes(two[0]).items()}
    for name, change in dense_changes(two[1]).items():
        exact[name] = exact.get(name, 0) + 0.5 * change
    error = sum(float((change - exact[name]).square().sum()) for name, change in dense_changes(merged).items())
    total = next(line for line in caplog.text.splitlines() if line.startswith("total")).split()
    norm = sum(float(change.square().sum()) for change in exact.values()) ** 0.5
    assert float(total[2]) == pytest.approx(norm, rel=1e-3)
    assert float(total[3]) == pytest.approx(100 * error**0.5 / norm, rel=1e-2)
    assert "use --exact for that" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO):
        together(tmp_path / "e.safetensors", *two, ratios=(0.5, 0.5), exact=True)
    total = next(line for line in caplog.text.splitlines() if line.startswith("total")).split()
    assert total[3:] == ["<", "0.01", "%"] and "use --exact" not in caplog.text


def test_metadata_and_hashes(two, tmp_path):
    merged = together(tmp_path / "out.safetensors", *two, save_precision="bf16")
    metadata = read_header(merged).metadata
    assert metadata["ss_network_module"] == "networks.lora" and metadata["ss_base_model_version"] == "sd_v1"
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"], metadata["ss_v2"]) == ("4", "Dynamic", "False")
    assert metadata["modelspec.merged_from"] == "a, b" and metadata["modelspec.title"] == "out"
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1/lora"
    tensors = load_tensors(merged)
    assert (metadata["sshs_model_hash"], metadata["sshs_legacy_hash"]) == sshs_hashes(tensors, metadata)
    assert {tensor.dtype for name, tensor in tensors.items() if "lora_" in name.partition(".")[2]} == {torch.bfloat16}
    plain = read_header(together(tmp_path / "n.safetensors", *two, concat=True, no_metadata=True)).metadata
    assert plain["ss_network_dim"] == "Dynamic" and not any(name.startswith("modelspec") for name in plain)


def test_what_stands_for_the_base_model_where_no_file_tells(tmp_path):
    save_file(lora_tensors("sd1", every=50), tmp_path / "a.safetensors")
    kinds = [({}, "stable-diffusion-v1/lora"), ({"v2": True}, "stable-diffusion-v2-768-v/lora"),
             ({"group": MergeOptions}, "stable-diffusion-xl-v1-base/lora")]  # fmt: skip
    for settings, architecture in kinds:
        merged = together(tmp_path / "out.safetensors", tmp_path / "a.safetensors", **settings)
        assert read_header(merged).metadata["modelspec.architecture"] == architecture
    with pytest.raises(OptionError, match="--v2: .* is for SD 1.x; leave the flag out"):
        together(tmp_path / "o.safetensors", tiny_lora(tmp_path / "b.safetensors", "sd1", every=50), v2=True)


def test_pytorch_files(two, tmp_path):
    written = torch.load(together(tmp_path / "out.pt", *two), weights_only=True)
    reference = load_tensors(together(tmp_path / "out.safetensors", *two))
    assert written.keys() == reference.keys() and all(torch.equal(written[name], reference[name]) for name in written)


def test_matrices_and_pointwise_convolutions(tmp_path):
    tensors = lora_tensors("sd1", every=40)
    save_file(tensors, tmp_path / "a.safetensors")
    other = {name: tensor[:, :, 0, 0] if tensor.shape[2:] == (1, 1) else tensor for name, tensor in tensors.items()}
    save_file(other, tmp_path / "b.safetensors")
    merged = load_tensors(
        together(tmp_path / "out.safetensors", tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    )
    for name, tensor in tensors.items():
        assert merged[name].shape == tensor.shape
        torch.testing.assert_close(merged[name], tensor if name.endswith("alpha") else 2 * tensor)
    assert any(tensor.ndim != other[name].ndim for name, tensor in tensors.items())


def test_block_weights(tmp_path):
    network = tiny_lora(tmp_path / "a.safetensors", "sd1")
    lists = ("[0,0,0,0,0,0,0,0.5,0,0,0,0,0,0,0,0,0]",)
    merged = dense_changes(together(tmp_path / "out.safetensors", network, lbws=lists, exact=True))
    changes = dense_changes(network)
    kept = {name for name in changes if "_mid_block_" in name}
    # blocks without a place in the list stay as they are
    always = {name for name in changes if any(f"_{block}_" in name for block in (
        "down_blocks_0_downsamplers", "down_blocks_1_downsamplers", "down_blocks_2_downsamplers", "down_blocks_3",
        "up_blocks_0"))}  # fmt: skip
    assert merged.keys() == kept | always
    for name in merged:
        torch.testing.assert_close(merged[name], changes[name] * (0.5 if name in kept else 1), rtol=1e-5, atol=1e-6)


def test_mistakes(two, tmp_path):
    def network(name, **how):
        return tiny_lora(tmp_path / f"{name}.safetensors", "sd1", **{"every": 40, **how})

    output = tmp_path / "out.safetensors"
    first, loha = network("first"), tmp_path / "loha.safetensors"
    save_file(lora_tensors("sd1", every=60) | {f"{CONV}.hada_w1_a": torch.ones(2, 2)}, loha)
    of_sdxl = tiny_lora(tmp_path / "x.safetensors", "sdxl", every=40)
    for networks, settings, problem in [
        ((first, network("rank", rank=2)), {}, r"has rank 4 in .*first.* and 2 in .*rank.*; use --exact"),
        ((first, network("alpha", alpha=-1.0)), {}, r"alpha of .* is -1 in .*alpha.*, which has no square root"),
        ((network("alpha", alpha=-1.0), first), {}, r"alpha of .* is -1 in .*alpha.*, which has no square root"),
        ((network("zero", alpha=0.0), first), {}, r"which has no square root; use --exact"),
        ((network("nan", alpha=float("inf")),), {"exact": True}, r"nan.safetensors: alpha of .* is inf, no"),
        ((first, of_sdxl), {}, rf"--models: {first} is for SD 1.x, and {of_sdxl} is for SDXL"),
        ((loha,), {}, rf"only a model .* no plain LoRA: {loha}: {CONV}; check"),
        ((first,), {"ratios": (0.0,), "exact": True}, r"nothing is left to merge"),
        ((first,), {"ratios": (1.0, 2.0)}, r"--ratios: 2 ratios for 1 model; give one"),
        ((first,), {"exact": True, "concat": True}, r"--exact: puts ranks side by side itself"),
        ((first,), {"lbws": ("[1]",)}, r"--lbws: a list has 1 values"),
        ((network("big", std=1e4),), {"save_precision": "fp16", "ratios": (1e3,)}, r"too large for float16"),
    ]:  # fmt: skip
        with pytest.raises(OptionError, match=problem):
            together(output, *networks, **settings)
        assert not output.exists()
    with pytest.raises(OptionError, match=r"--save_to: .* is one of the networks"):
        together(first, first)
    assert load_tensors(together(output, loha, ignore_unmatched=True)).keys() == lora_tensors("sd1", every=60).keys()


def test_nothing_is_left_of_networks_with_nan(tmp_path):
    tensors = lora_tensors("sd1", every=40)
    name = next(each for each in tensors if each.endswith("lora_down.weight"))
    tensors[name][0] = float("nan")
    save_file(tensors, tmp_path / "a.safetensors")
    for exact in (False, True):
        with pytest.raises(OptionError, match=rf"a.safetensors: {name.partition('.')[0]} holds NaN"):
            together(tmp_path / "out.safetensors", tmp_path / "a.safetensors", exact=exact)
    assert [each.name for each in tmp_path.iterdir()] == ["a.safetensors"]


def test_the_older_tool(two, tmp_path, tiny_sd1_path, caplog):
    def older(output, *paths, ratios, **settings):
        merge_as_before(OldMergeOptions(save_to=str(output), models=tuple(map(str, paths)), ratios=ratios, **settings))
        return load_tensors(output)

    first, _ = two
    third = tiny_lora(tmp_path / "c.safetensors", "sd1", seed=3, every=3)
    merged = older(tmp_path / "o.safetensors", first, third, ratios=(0.5, 0.25))
    assert "superseded" in caplog.text
    one, three = load_tensors(first), load_tensors(third)
    for name, tensor in merged.items():
        expected = one[name] if name.endswith("alpha") else 0.5 * one[name] + 0.25 * three[name]
        torch.testing.assert_close(tensor, expected)
    for paths, ratios, problem in [(two, (1.0, 1.0), "--models: .* has another alpha"),
                                   ((first, third), (1.0, -1.0), "--ratios: -1 is negative")]:  # fmt: skip
        with pytest.raises(OptionError, match=problem):
            older(tmp_path / "p.safetensors", *paths, ratios=ratios)
    into = older(tmp_path / "m.safetensors", *two, ratios=(1.0, -1.0), sd_model=str(tiny_sd1_path))
    merge(SdMergeOptions(save_to=str(tmp_path / "n.safetensors"), models=tuple(map(str, two)), ratios=(1.0, -1.0),
                         sd_model=str(tiny_sd1_path)))  # fmt: skip
    reference = load_tensors(tmp_path / "n.safetensors")
    assert all(torch.equal(tensor, reference[name]) for name, tensor in into.items())
