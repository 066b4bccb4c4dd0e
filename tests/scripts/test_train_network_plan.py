"""--plan, and the report of every run: the same numbers as the run that follows."""

from __future__ import annotations

import json
import re

import pytest
from PIL import Image
from safetensors.torch import load_file

from library.checkpoints.weights import SafetensorsWeights
from library.train.run_sections import size
from tests.runs import logged, metadata_of, train_network
from tests.tiny_data import tiny_image, tiny_images


@pytest.fixture
def no_weights(monkeypatch):
    """Reading a tensor of a model's file fails."""

    def fail(self, name):
        raise AssertionError(f"{name} was read")

    monkeypatch.setattr(SafetensorsWeights, "tensor", fail)


def plan_text(folder):
    return (folder / "net-plan.txt").read_text(encoding="utf-8")


def fact(text: str, name: str) -> str:
    """The value beside a name."""
    (value,) = re.findall(rf"^  {re.escape(name)}  +(.*)$", text, re.MULTILINE)
    return value


def test_a_plan_reads_no_weights_and_writes_no_model(options, tmp_path, no_weights, capsys):
    assert train_network(**options, plan=True) == 0
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == ["net-plan.txt", "net.log", "report.html"]
    text = plan_text(out)
    for line in ("WARNING", "Folders", "Buckets", "Captions", "What is trained", "Steps", "Files", "Memory"):
        assert line in text
    assert "activations" in text and text in capsys.readouterr().err
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.count("<img") >= 6 and "data:image/jpeg;base64," in page


RUNS = {
    "plain": {},
    "accumulation, schedule": {"gradient_accumulation_steps": 2, "lr_scheduler": "cosine", "lr_warmup_steps": 1},
    "parts": {"network_args": ["conv_dim=2", "conv_alpha=1"], "text_encoder_lr": 5e-4, "save_precision": "fp16"},
    "v2": {"v2": True, "network_train_unet_only": True},
}


@pytest.mark.parametrize("name", RUNS)
def test_the_numbers_are_those_of_the_run(options, tmp_path, name, tiny_sd2_path):
    if name == "v2":
        options["pretrained_model_name_or_path"] = tiny_sd2_path
    options |= {
        **RUNS[name],
        "max_train_steps": None,
        "max_train_epochs": 1,
        "save_every_n_steps": 2,
        "save_state": True,
    }
    assert train_network(**options, plan=True) == 0
    text = plan_text(tmp_path / "out")
    assert train_network(**options, logging_dir=tmp_path / "log") == 0
    out = tmp_path / "out"
    metadata = metadata_of(out / "net.safetensors")
    losses = logged(tmp_path / "log", "loss/current")
    assert fact(text, "steps").startswith(f"{len(losses)} in 1 epoch of {len(losses)}")
    assert metadata["ss_steps"] == str(len(losses))
    assert fact(text, "batches per epoch") == metadata["ss_num_batches_per_epoch"]
    rates = logged(tmp_path / "log", "lr/unet")
    *_, first, peak, last = re.findall(r"^  unet +(\S+) +(\S+) +(\S+)$", text, re.MULTILINE)[-1]
    assert (float(first), float(peak), float(last)) == pytest.approx((rates[0], max(rates), rates[-1]), rel=1e-2)
    written = sorted(path.name for path in out.glob("*.safetensors"))
    files = text[text.index("\nFiles\n") : text.index("\nMemory\n")]
    assert sorted(set(re.findall(r"^  (net\S*\.safetensors)  ", files, re.MULTILINE))) == written
    parameters = sum(int(n.replace(",", "")) for n in re.findall(r"([\d,]+) parameters, learning rate", text))
    log = (out / "net.log").read_text(encoding="utf-8")
    assert text[text.index("\nFolders\n") : text.index("\nMemory\n")] in log, "the run says what its plan said"
    tensors = load_file(out / "net.safetensors")
    assert parameters == sum(tensor.numel() for key, tensor in tensors.items() if not key.endswith(".alpha"))
    saved = size(sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()))
    assert f"net.safetensors ({saved} each, with a state of" in fact(text, "saved")


def test_odd_data_is_told(options, tmp_path, capsys):
    folder = tmp_path / "photos" / "3_thing"
    paths = tiny_images(folder, 4, sizes=((64, 64),))
    paths[0].with_suffix(".txt").write_text("word " * 90)
    paths[1].with_suffix(".txt").write_text("")
    (folder / "copy.png").write_bytes(paths[0].read_bytes())
    tiny_image((16, 16), seed=5).save(folder / "tiny.png")
    tiny_image((400, 64), seed=6).save(folder / "wide.png")
    with Image.open(paths[2]) as image:
        image.resize((128, 128)).save(folder / "again.jpg", quality=80)
    exif = Image.Exif()
    exif[0x0112] = 8
    tiny_image((64, 96), seed=7).save(folder / "turned.jpg", exif=exif)
    (folder / "broken.jpg").write_bytes(paths[1].read_bytes()[:200])
    tiny_images(tmp_path / "photos" / "unnamed", 1)
    options |= {"train_data_dir": tmp_path / "photos", "on_bad_image": "skip", "train_batch_size": 4}
    assert train_network(**options, plan=True) == 0
    text = plan_text(tmp_path / "out")
    for part in (
        "1 image can't be read and is left out", "1 caption file without text", "5 images without a caption",
        "trained on 'thing'",
        "1 caption longer than the 75 tokens", "--max_token_length 150", "1 image file equal to another one",
        "the captions differ", "2 images in 1 group look alike", "2 images lose more than 25%", "wide.png",
        "tiny.png: 4.0 x, 16x16",
        "1 photo turned", "does not begin with the repeats", "90 tokens, 15 cut off",
    ):  # fmt: skip
        assert part in text, part
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert page.index("look alike") < page.index('id="buckets"'), "problems first"


def test_advice_on_sizes_knows_the_dataset_file(options, tmp_path):
    """Buckets that a dataset file switches on are not advised again."""
    tiny_images(tmp_path / "a", 3, sizes=((96, 32),))
    dataset = "resolution = 64\nbatch_size = 1\nenable_bucket = true\nmin_bucket_reso = 64\nmax_bucket_reso = 64\n"
    (tmp_path / "data.toml").write_text(
        f"[[datasets]]\n{dataset}[[datasets.subsets]]\nimage_dir = '{tmp_path / 'a'}'\n"
    )
    given = {"train_data_dir": None, "enable_bucket": None, "min_bucket_reso": None, "max_bucket_reso": None}
    assert train_network(**{**options, **given}, dataset_config=tmp_path / "data.toml", plan=True) == 0
    text = plan_text(tmp_path / "out")
    assert "try a larger --max_bucket_reso" in text and "; --bucket_no_upscale never enlarges" in text
    assert "--enable_bucket" not in text


def test_a_plan_tells_rank_and_strength_and_what_has_no_effect(options, tmp_path):
    assert train_network(**options, plan=True, prior_loss_weight=0.5) == 0
    text = plan_text(tmp_path / "out")
    assert fact(text, "network") == "networks.lora, rank 4, alpha 1: strength 0.25 (alpha / rank)"
    assert "--prior_loss_weight 0.5 has no effect: there are no regularisation pictures" in text


def test_a_plan_lists_what_would_stop_a_run(options, tmp_path, capfd):
    """Broken pictures, and entries of a metadata file that lead nowhere; each is said once."""
    folder = tmp_path / "1_a"
    paths = tiny_images(folder, 4, sizes=((32, 32),))
    paths[0].write_bytes(paths[0].read_bytes()[:100])
    options["train_data_dir"] = tmp_path / "1_a"
    assert train_network(**options, plan=True) == 0
    said, text = capfd.readouterr().err, plan_text(tmp_path / "out")
    for part in ("1 image can't be read: a run would stop here", "1_a/image_000.png: ", "--on_bad_image skip trains"):
        assert part in text and said.count(part) == 1
    assert "3 images too small" in text and "--bucket_no_upscale never enlarges" in text
    assert train_network(**{**options, "enable_bucket": False}, plan=True) == 0
    assert "--enable_bucket --bucket_no_upscale never enlarges" in plan_text(tmp_path / "out")
    assert train_network(**options) == 2
    capfd.readouterr()
    (tmp_path / "meta.json").write_text(json.dumps({"image_001": {"caption": "x"}, "gone": {"caption": "y"}}))
    options |= {"train_data_dir": folder, "in_json": tmp_path / "meta.json"}
    assert train_network(**options, plan=True) == 0
    text = plan_text(tmp_path / "out")
    capfd.readouterr()
    assert "gone: is in " in text and "images passed over: in the folder of a metadata file" in text
    assert train_network(**options, on_bad_image="skip") == 0
    said = capfd.readouterr().err
    assert said.count("1 image can't be read and is left out (") == 1 and said.count("passed over") == 1


def test_settings_can_be_typed_again(options, tmp_path):
    folder = tmp_path / "my photos"
    tiny_images(folder, 2)
    options |= {"train_data_dir": folder, "network_args": ["conv_dim=2", "conv_alpha=1"], "resolution": "64,96"}
    assert train_network(**options, plan=True) == 0
    settings = plan_text(tmp_path / "out").split("\nSettings\n")[1]
    written = dict(re.findall(r"^  --(\S+) +(.*)$", settings, re.MULTILINE))
    assert written["resolution"] == "64,96" and written["network_args"] == "conv_dim=2 conv_alpha=1"
    assert written["train_data_dir"] == f'"{folder.as_posix()}"'


def test_a_run_says_it_briefly_and_writes_it_whole(options, tmp_path, capsys):
    assert train_network(**options) == 0
    said, log = capsys.readouterr().err, (tmp_path / "out" / "net.log").read_text(encoding="utf-8")
    assert "trained: unet" in said and "Settings" not in said
    assert "Settings" in log and log.index("Settings") < log.index("saving")
    assert (tmp_path / "out" / "report.html").is_file()
    assert re.search(r"^3 steps in 0:\d\d:\d\d, average loss \d+\.\d{4}$", said, re.MULTILINE)


def test_a_plan_of_a_dataset_file(options, tmp_path, images):
    folder = str(images / "2_disc")
    content = {"datasets": [
        {"resolution": 64, "batch_size": 2, "subsets": [{"image_dir": folder, "num_repeats": 3}]},
        {"resolution": 128, "batch_size": 1, "subsets": [{"image_dir": folder}]},
    ]}  # fmt: skip
    (tmp_path / "data.json").write_text(json.dumps(content))
    options |= {"train_data_dir": None, "dataset_config": tmp_path / "data.json", "max_train_steps": 20}
    assert train_network(**options, plan=True) == 0
    text = plan_text(tmp_path / "out")
    assert "dataset 1" in text and "buckets around 128x128, batch size 1" in text
    rows = re.findall(r"^  dataset (\d) +(\d+) pictures .* batches of up to (\d): (\d+) batches$", text, re.MULTILINE)
    assert [row[:3] for row in rows] == [("1", "18", "2"), ("2", "6", "1")]
    assert sum(int(row[3]) for row in rows) == int(fact(text, "batches per epoch"))


def test_a_plan_of_a_resumed_run(options, tmp_path):
    assert train_network(**options, save_state=True) == 0
    options |= {"max_train_steps": 9, "resume": "latest"}
    assert train_network(**options, plan=True) == 0
    assert fact(plan_text(tmp_path / "out"), "goes on after step") == "3, 6 to go"


MISTAKES = {
    "optimizer": ({"optimizer_args": ["betas=0.9,0.99", "nonsense=1"]}, "--optimizer_args"),
    "schedule": ({"lr_scheduler": "piecewise_constant"}, "step_rules"),
    "nothing to train": ({"learning_rate": 0.0}, "nothing is left to train"),
    "module": ({"network_module": "networks.lorra"}, "--network_module"),
    "folder": ({"train_data_dir": "nowhere"}, "--train_data_dir"),
    "clip skip": ({"clip_skip": 5}, "--clip_skip"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_those_of_a_run(options, name, capsys):
    changes, part = MISTAKES[name]
    options |= changes
    sentences = []
    for plan in (True, False):
        assert train_network(**options, plan=plan) == 2
        sentences.append(capsys.readouterr().err.strip().splitlines()[-1])
    assert sentences[0] == sentences[1] and part in sentences[0]


MODULE = """
import torch

class Network(torch.nn.Module):
    def __init__(self, unet):
        super().__init__()
        self.lora_unet_scale = torch.nn.Parameter(torch.full((3,), float(next(unet.parameters()).mean())))
    def apply_to(self, *arguments): pass
    def prepare_optimizer_params(self, text_lr, unet_lr, lr): return [{"params": [self.lora_unet_scale], "lr": lr}]
    def prepare_grad_etc(self, *arguments): pass
    def on_epoch_start(self, *arguments): pass
    def enable_gradient_checkpointing(self): pass
    def get_trainable_params(self): return self.parameters()
    def save_weights(self, file, dtype, metadata): pass

def create_network(multiplier, dim, alpha, vae, text_encoder, unet, **arguments):
    return Network(unet)
"""


def test_a_network_that_needs_weights_is_not_known_before(options, tmp_path, monkeypatch):
    (tmp_path / "needs_weights.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    assert train_network(**{**options, "network_module": "needs_weights"}, plan=True) == 0
    text = plan_text(tmp_path / "out")
    assert fact(text, "trained").startswith("not known before loading: needs_weights")
    assert fact(text, "steps") == "3 of the 6 of an epoch"


def test_a_report_that_cannot_be_written_does_not_stop_a_run(options, tmp_path, caplog):
    (tmp_path / "out" / "report.html").mkdir(parents=True)
    assert train_network(**options) == 0
    assert "report.html can't be written" in caplog.text
