"""networks/extract_lora_from_dylora.py, check_lora_weights.py and lora_interrogator.py."""

import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from library.checkpoints.safetensors_io import save_file, sshs_hashes
from networks import check_lora_weights, extract_lora_from_dylora, lora_interrogator
from networks.injection import write_network_file
from networks.lora import create_network
from tests.runs import ROOT
from tests.tiny_networks import perturb, tiny_parts

METADATA = {"ss_network_dim": "6", "ss_training_comment": "mine", "ss_network_module": "networks.dylora"}


def run(tool, *words):
    return tool.TOOL.run([str(word) for word in words])


def lora(path, kind="sd1", metadata=METADATA, **arguments):
    text_encoder, unet = tiny_parts(kind)
    network = create_network(1.0, 6, 3.0, None, text_encoder, unet, **arguments)
    perturb(network)
    network.save_weights(path, None, metadata)
    return text_encoder, network


@pytest.mark.parametrize("extension", [".safetensors", ".pt"])
def test_dylora_is_split(extension, tmp_path):
    lora(tmp_path / "a.safetensors", conv_dim="6", conv_alpha="3")
    assert run(extract_lora_from_dylora, "--model", tmp_path / "a.safetensors", "--unit", 2, "--save_to",
               tmp_path / f"out{extension}") == 0  # fmt: skip
    whole = load_file(tmp_path / "a.safetensors")
    names = sorted(path.name for path in tmp_path.glob("out*"))
    assert names == [f"out-000{rank}{extension}" for rank in (2, 4, 6)]
    for rank, name in zip((2, 4, 6), names, strict=True):
        path = tmp_path / name
        part = torch.load(path, weights_only=True) if extension == ".pt" else load_file(path)
        assert part.keys() == whole.keys()
        for key, tensor in whole.items():
            expected = tensor[:rank] if "lora_down" in key else tensor[:, :rank] if "lora_up" in key else tensor
            assert torch.equal(part[key], expected), key
        if extension == ".safetensors":
            with safe_open(path, "pt") as file:
                metadata = file.metadata()
            assert metadata["ss_training_comment"] == f"split from DyLoRA, rank 6 to {rank}; mine"
            assert metadata["ss_network_dim"] == str(rank)
            assert (metadata["sshs_model_hash"], metadata["sshs_legacy_hash"]) == sshs_hashes(part, metadata)


def test_dylora_without_metadata_and_mistakes(tmp_path, capsys):
    source = tmp_path / "a.safetensors"
    pair = {"lora_unet_x.lora_down.weight": torch.randn(3, 4), "lora_unet_x.lora_up.weight": torch.randn(4, 3)}
    save_file(pair, source)
    assert run(extract_lora_from_dylora, "--model", source, "--unit", 2, "--save_to", tmp_path / "out.safetensors") == 0
    assert sorted(path.name for path in tmp_path.glob("out*")) == ["out-0002.safetensors", "out-0003.safetensors"]
    with safe_open(tmp_path / "out-0002.safetensors", "pt") as file:
        assert file.metadata()["ss_training_comment"] == "split from DyLoRA, rank 3 to 2"
    (tmp_path / "b-0003.safetensors").write_bytes(source.read_bytes())
    save_file({"lora_unet_x.alpha": torch.ones(())}, tmp_path / "none.safetensors")
    save_file({key: tensor for key, tensor in pair.items() if "up" not in key}, tmp_path / "half.safetensors")
    save_file(pair, tmp_path / "ok.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(source.read_bytes()[:-4])
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    out = tmp_path / "new.safetensors"
    for words, said in (
        (["--model", source, "--unit", 0, "--save_to", out], "--unit: 0 is no rank"),
        (["--model", source, "--unit", 4, "--save_to", out], "above the file's rank, 3"),
        (
            ["--model", tmp_path / "b-0003.safetensors", "--unit", 1, "--save_to", tmp_path / "b.safetensors"],
            "would be replaced",
        ),
        *(
            (["--model", source, "--unit", 1, "--save_to", place], "is a folder; name a file in it")
            for place in (tmp_path, "..", ".", "/", f"{tmp_path}/new/")
        ),
        *(
            (["--model", source, "--unit", 1, "--save_to", tmp_path / name], "does not end in .safetensors, .ckpt")
            for name in ("new", "new.txt", ".safetensors")
        ),
        (
            ["--model", tmp_path / "none.safetensors", "--unit", 1, "--save_to", out],
            "is incomplete: lora_unet_x has no lora_down.weight",
        ),
        (["--model", tmp_path / "half.safetensors", "--unit", 1, "--save_to", out], "is incomplete"),
        (["--model", tmp_path / "cut.safetensors", "--unit", 1, "--save_to", out], "is truncated"),
    ):
        capsys.readouterr()
        assert run(extract_lora_from_dylora, *words) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1, error
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    with pytest.raises(SystemExit):
        run(extract_lora_from_dylora, "--model", source, "--save_to", out)


@pytest.mark.parametrize(
    ("metadata", "unit", "said"),
    [
        ({"ss_network_module": "networks.lora"}, 2, "was trained with networks.lora"),
        ({"ss_network_module": "networks.dylora", "ss_network_args": '{"unit": "2"}'}, 3, "with unit=2, so a multiple"),
        ({"ss_network_module": "networks.dylora", "ss_network_args": '{"unit": "2"}'}, 4, ""),
        ({"ss_network_module": "networks.dylora", "ss_network_args": "nonsense"}, 3, ""),
        ({}, 2, ""),
    ],
)
def test_what_the_header_says_of_a_dylora_is_compared(metadata, unit, said, tmp_path, caplog):
    pair = {"lora_unet_x.lora_down.weight": torch.randn(6, 4), "lora_unet_x.lora_up.weight": torch.randn(4, 6)}
    save_file(pair, tmp_path / "a.safetensors", metadata)
    words = ["--model", tmp_path / "a.safetensors", "--unit", unit, "--save_to", tmp_path / "out.safetensors"]
    assert run(extract_lora_from_dylora, *words) == 0
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert said in warnings[0] if said else not warnings
    caplog.clear()
    assert run(extract_lora_from_dylora, *words) == 0
    assert f"out-{unit:04}.safetensors, " in caplog.text and "out-0006.safetensors: replaced" in caplog.text


def test_weights_are_listed_as_a_command(tmp_path):
    tensors = {
        "a.lora_down.weight": torch.tensor([[1.0, -3.0], [0.5, -0.5]]),
        "a.lora_up.weight": torch.full((3, 2, 1, 1), -2.0),
        "oft_unet_b.oft_blocks": torch.zeros(1, 2, 2),
        "a.alpha": torch.tensor(4),
    }
    write_network_file(tensors, tmp_path / "a.safetensors")
    script = ROOT / "networks" / "check_lora_weights.py"
    lines = [
        "number of LoRA weights: 3", "a.lora_down.weight,(2-2),1.25,0.5", "a.lora_up.weight,(3-2-1-1),2.0,2.0",
        "oft_unet_b.oft_blocks,(1-2-2),0.0,0.0",
    ]  # fmt: skip
    for words, more in (([], []), (["-s"], ["a.alpha,(),4.0,4.0"])):
        command = [sys.executable, script, tmp_path / "a.safetensors", *words]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        head, *rest = result.stdout.splitlines()
        assert sorted([head, *rest]) == sorted(lines + more) and head == lines[0]
    save_file({"x": torch.ones(1)}, tmp_path / "b.safetensors")
    assert run(check_lora_weights, tmp_path / "b.safetensors") == 2
    assert run(check_lora_weights, tmp_path / "b.safetensors", "--show_all_keys") == 0


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_words_that_change_most(kind, tmp_path, request, capsys, monkeypatch):
    """The first words of the list are those of the largest difference, computed here for a few of them."""
    encoders, _ = lora(tmp_path / "a.safetensors", kind)
    base = request.getfixturevalue(f"tiny_{kind}_path")
    monkeypatch.setattr(lora_interrogator, "Vocabulary", FewWords)
    words = ["--sd_model", base, "--model", tmp_path / "a.safetensors", "--batch_size", 7, "--clip_skip", 2]
    assert run(lora_interrogator, *words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 20 and lines[0].startswith("[1]: ")
    scores = [float(line.rsplit(": ", 1)[1]) for line in lines]
    assert scores == sorted(scores, reverse=True) and scores[0] > scores[-1] > 0
    token = int(lines[0].split()[1])
    network = made_again(kind, base, tmp_path / "a.safetensors")
    assert scores[0] == pytest.approx(difference(network, token), rel=1e-3)
    assert encoders is not None


class FewWords(lora_interrogator.Vocabulary):
    """The first twenty words, so that it takes a second."""

    def __init__(self, texts):
        super().__init__(texts[:20])


def made_again(kind, base, file):
    """(text encoders, LoRA that is hooked to them), loaded in another way than the tool does it."""
    from library.families.base import LoadPlan
    from library.families.options import ModelOptions
    from library.families.sd import StableDiffusion
    from library.families.sdxl import StableDiffusionXL
    from library.models.options import AttentionOptions
    from networks.lora import create_network_from_weights

    family = StableDiffusionXL() if kind == "sdxl" else StableDiffusion()
    plan = LoadPlan(torch.float32, torch.float32, torch.float32, torch.device("cpu"))
    model = family.load(ModelOptions(pretrained_model_name_or_path=str(base)), AttentionOptions(), plan)
    encoders = list(model.text_encoders)
    given = encoders if kind == "sdxl" else encoders[0]
    network, _ = create_network_from_weights(1.0, file, None, given, model.unet, for_inference=True)
    network.apply_to(given, model.unet)
    network.load_weights(file)
    return encoders, network


@torch.no_grad()
def difference(made, token):
    encoders, network = made
    ids = torch.tensor([[49406, token, 49407]])
    states = []
    for multiplier in (0.0, 1.0):
        network.set_multiplier(multiplier)
        found = [encoder(ids, layer_from_end=2) for encoder in encoders]
        states.append(torch.cat([part[0] if isinstance(part, tuple) else part for part in found], dim=-1))
    return float((states[1] - states[0]).abs().mean())


def test_interrogating_what_has_no_text_encoder(tmp_path, tiny_sd1_path, capsys):
    pair = {"lora_unet_x.lora_down.weight": torch.randn(3, 4), "lora_unet_x.lora_up.weight": torch.randn(4, 3)}
    save_file(pair, tmp_path / "a.safetensors")
    words = ["--sd_model", tiny_sd1_path, "--model", tmp_path / "a.safetensors"]
    assert run(lora_interrogator, *words) == 2
    assert "changes no text encoder" in capsys.readouterr().err
    assert run(lora_interrogator, *words, "--v2") == 2
    assert "--v2: the model" in capsys.readouterr().err
    assert run(lora_interrogator, *words, "--batch_size", 0) == 2


@pytest.mark.skipif(sys.platform == "win32", reason="pipes end otherwise there")
def test_a_reader_that_has_seen_enough_is_no_failure(tmp_path):
    lora(tmp_path / "a.safetensors")
    command = [sys.executable, "networks/check_lora_weights.py", str(tmp_path / "a.safetensors")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        said = process.stderr.read()
    assert (process.returncode, said) == (141, b"")
