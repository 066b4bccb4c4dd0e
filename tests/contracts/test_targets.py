"""What every training target must do with every family it is offered for. A new script adds a row to CASES.

Its own parameters move and nothing else; what it writes reads back equal; a resumed run ends in the same weights, and
so do, but for rounding, two processes that share its batches.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from library.cli import training as command_line
from library.families.base import LoadPlan
from library.targets.base import TrainTarget
from library.train import logs, placement
from library.train.loop import train
from library.train.preflight import check_before_start
from library.train.run import Run
from library.train.session import build_run
from tests.runs import equal_files, flags, in_two_processes, run_script
from tests.tiny_data import tiny_images
from tests.tiny_metadata import tiny_metadata

FLOAT32 = LoadPlan(torch.float32, torch.float32, torch.float32, torch.device("cpu"))
LORA = {"network_module": "networks.lora", "network_dim": 2}
FULL = {"save_model_as": "safetensors"}


@dataclass(frozen=True)
class Case:
    """One way to use a target."""

    name: str
    script: str
    kind: str = "sd1"
    options: dict[str, Any] = field(default_factory=dict)
    moves: frozenset[str] = frozenset()  # the parts of the model whose weights change

    @property
    def entry(self) -> Any:
        return importlib.import_module(self.script)


UNET, TEXT, BOTH = frozenset({"unet"}), frozenset({"text_encoder"}), frozenset({"text_encoder", "text_encoder_2"})
CASES = [
    Case("network", "train_network", options=LORA),
    Case("network, SDXL", "sdxl_train_network", "sdxl", LORA),
    Case("fine_tune", "fine_tune", options=FULL, moves=UNET),
    Case("fine_tune, text", "fine_tune", options={**FULL, "train_text_encoder": True}, moves=UNET | TEXT),
    Case("train_db", "train_db", options=FULL, moves=UNET | TEXT),
    Case("train_db, SD 2", "train_db", "sd2", {**FULL, "stop_text_encoder_training": 1}, UNET | TEXT),
    Case("sdxl_train", "sdxl_train", "sdxl", FULL, UNET),
    Case(
        "sdxl_train, text and blocks",
        "sdxl_train",
        "sdxl",
        {**FULL, "train_text_encoder": True, "learning_rate_te1": 0, "block_lr": ",".join(["0"] * 13 + ["1e-3"] * 10)},
        UNET | {"text_encoder_2"},
    ),
]
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A folder with one class of images, and a metadata file of the same ones."""
    folder = tmp_path_factory.mktemp("data")
    tiny_images(folder / "2_disc", 6)
    tiny_metadata(folder / "2_disc", folder / "meta.json")
    return folder


@pytest.fixture
def start(request, tmp_path, data) -> Callable[[Case], dict[str, Any]]:
    """The options of a short run of a case."""

    def options_of(case: Case) -> dict[str, Any]:
        source = {"train_data_dir": data}
        if case.script == "fine_tune":
            source = {"train_data_dir": data / "2_disc", "in_json": data / "meta.json", "dataset_repeats": 2}
        return {
            "pretrained_model_name_or_path": request.getfixturevalue(f"tiny_{case.kind}_path"), **source,
            "output_dir": tmp_path / "out", "output_name": "net", "resolution": 64, "train_batch_size": 2,
            "max_train_steps": 4, "learning_rate": 1e-3, "seed": 1, "max_data_loader_n_workers": 0, **case.options,
        }  # fmt: skip

    return options_of


def built(case: Case, options: dict[str, Any]) -> Run:
    """The run, ready to train, in this process."""
    from accelerate.state import AcceleratorState, PartialState

    PartialState._reset_state()
    AcceleratorState._reset_state(True)
    config, _ = command_line.parse(case.entry.SCRIPT, flags(**options))
    assert config is not None
    script = case.entry.SCRIPT
    checked = check_before_start(config, script.other_script, script.models, script.datasets)
    family, target = command_line._load(script, checked.config)
    accelerator = placement.make_accelerator(checked.config, autocast=target.needs_autocast)
    logs.start_trackers(accelerator, checked.config.logging, "test", {})
    run = build_run(checked, family, target, accelerator)
    run.metadata_of = lambda step, epoch, ending: {"modelspec.title": "a test"}
    run.open_log()
    return run


def parts_of(run: Run) -> dict[str, torch.nn.Module]:
    bundle = run.bundle
    encoders = dict(zip(("text_encoder", "text_encoder_2"), bundle.text_encoders, strict=False))
    return {"unet": bundle.unet, "vae": bundle.vae, **encoders}


def weights_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all that a module holds, without what others have hung into it."""
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def changed(before: dict[str, torch.Tensor], module: torch.nn.Module) -> set[str]:
    return {name for name, tensor in module.state_dict().items() if not torch.equal(before[name], tensor)}


@each_case
def test_only_its_parameters_move(case, start):
    run = built(case, start(case))
    parts = parts_of(run)
    before = {name: weights_of(part) for name, part in parts.items()}
    trained_before = weights_of(run.target.trained_module())
    grouped = {id(parameter) for parameter in run.parameters}
    assert grouped == {id(p) for p in run.target.trained_module().parameters() if p.requires_grad}
    assert not any(p.requires_grad for part in parts.values() for p in part.parameters() if id(p) not in grouped)
    assert train(run) == 0
    assert changed(trained_before, run.target.trained_module())
    for name, part in parts.items():
        moved = changed(before[name], part)
        trainable = {key for key, parameter in part.named_parameters() if id(parameter) in grouped}
        assert moved <= trainable, f"{name}: something moved that is in no group"
        assert bool(moved) == (name in case.moves), name


@each_case
def test_what_it_writes_reads_back_equal(case, start, tmp_path):
    options = start(case)
    run = built(case, {**options, "max_train_steps": 2})
    assert train(run) == 0
    file = tmp_path / "out" / "net.safetensors"
    if not case.moves:
        trained, stored = run.target.trained_module().state_dict(), load_file(file)
        assert trained.keys() == stored.keys() and all(torch.equal(trained[name], stored[name]) for name in stored)
        return
    config = run.config
    again = run.family.load(type(config.model)(pretrained_model_name_or_path=str(file)), config.attention, FLOAT32)
    for ours, theirs in zip(
        (run.bundle.unet, run.bundle.vae, *run.bundle.text_encoders), (again.unet, again.vae, *again.text_encoders),
        strict=True,
    ):  # fmt: skip
        assert not changed(weights_of(ours), theirs)


@each_case
def test_a_resumed_run_ends_in_the_same_weights(case, start, tmp_path):
    options = {**start(case), "lr_scheduler": "cosine", "lr_warmup_steps": 1, "ema_decay": 0.9}
    assert run_script(case.entry, {**options, "save_every_n_steps": 2, "save_state": True}) == 0
    again = {**options, "output_dir": tmp_path / "again", "resume": tmp_path / "out" / "net-step00000002-state"}
    assert run_script(case.entry, again) == 0
    for name in ("net.safetensors", "net-ema.safetensors"):
        assert equal_files(tmp_path / "out" / name, tmp_path / "again" / name)


@each_case
def test_two_processes_equal_one(case, start, tmp_path):
    options = start(case) | {"resolution": 128, "optimizer_type": "SGDNesterov", "max_train_steps": 2}
    rate = 0.1 if not case.moves else 1e-3
    options |= {"learning_rate": rate}
    assert run_script(case.entry, {**options, "train_batch_size": 2}) == 0
    in_two_processes(f"{case.script}.py", **{**options, "train_batch_size": 1, "output_dir": tmp_path / "two"})
    base = load_file(Path(options["pretrained_model_name_or_path"])) if case.moves else {}
    one, two = (load_file(tmp_path / name / "net.safetensors") for name in ("out", "two"))
    assert one.keys() == two.keys()
    trained = [name for name in one if case.moves or "lora_up" in name]
    length = sum((one[name] - base.get(name, torch.zeros(()))).float().square().sum() for name in trained).sqrt()
    distance = sum((one[name] - two[name]).float().square().sum() for name in one).sqrt()
    assert length > 0 and distance < 1e-3 * length, "the same training up to rounding"


def test_every_target_is_covered():
    from library.targets.full import FullTarget
    from library.targets.network import NetworkTarget

    targets = {case.entry.SCRIPT.target.partition(":")[2] for case in CASES}
    assert targets == {found.__name__ for found in (FullTarget, NetworkTarget)}
    assert {NetworkTarget, FullTarget} == set(TrainTarget.__subclasses__())
