"""Folders of ours are replaced; nothing that somebody else put there is ever deleted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from library.checkpoints.own_folders import MODEL_FOLDER, STATE_FOLDER
from library.checkpoints.safetensors_io import NonFiniteError
from library.options import OptionError
from library.train.checkpoints import RawTensors, save_state
from library.train.resume import RunState, find_state
from tests.unit.test_plan import checkpointer, names_in
from tests.unit.test_saving import family_of, load

STATE = RunState(1, 1, {}, {}, [], 0)


def files(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    return folder


@pytest.mark.parametrize(
    ("names", "fault"),
    [
        (["model_index.json", "unet/config.json", "tokenizer/vocab.json"], None),
        ([], None),
        (["unet/config.json"], "no model_index.json"),
        (["model_index.json", "readme.md"], "readme.md"),
        (["model_index.json", "unet/cat.png"], "unet/cat.png"),
        (["model_index.json", "tokenizer/more/x.json"], "tokenizer/more"),
        (["model_index.json", "10_cats/cat.png"], "10_cats"),
    ],
)
def test_what_is_foreign_in_a_model_folder(tmp_path, names, fault):
    found = MODEL_FOLDER.foreign_in(files(tmp_path, *names))
    assert found is None if fault is None else found is not None and fault in found


def test_a_diffusers_folder_replaces_its_like_alone(tiny_sd1_path, tmp_path, caplog):
    bundle, family = load(tiny_sd1_path, "sd1"), family_of("sd1")
    for _ in range(2):
        family.save(bundle, tmp_path / "net", dtype=None, metadata={}, as_diffusers=True)
    assert names_in(tmp_path) == ["net"] and MODEL_FOLDER.foreign_in(tmp_path / "net") is None
    files(tmp_path, "net/cat.png")
    family.save(bundle, tmp_path / "net", dtype=None, metadata={}, as_diffusers=True)
    assert names_in(tmp_path) == ["net", "net-2"] and (tmp_path / "net/cat.png").exists()
    assert "net-2" in caplog.text
    assert MODEL_FOLDER.foreign_in(tmp_path / "net-2") is None


def test_a_state_replaces_its_like_alone(tmp_path):
    module = torch.nn.Linear(2, 2)
    for _ in range(2):
        save_state(tmp_path / "net-state", STATE, trained=RawTensors(module), others={})
    assert names_in(tmp_path) == ["net-state"]
    assert STATE_FOLDER.foreign_in(tmp_path / "net-state") is None
    files(tmp_path, "net-state/cat.png")
    save_state(tmp_path / "net-state", STATE, trained=RawTensors(module), others={})
    assert names_in(tmp_path) == ["net-2-state", "net-state"] and (tmp_path / "net-state/cat.png").exists()
    assert find_state(str(tmp_path / "net-2-state"), None) is not None


def test_rotation_removes_no_foreign_folder(tmp_path):
    saver = checkpointer(tmp_path, save_every_n_steps=1, save_last_n_steps=1, save_state=True)
    for step in range(1, 6):
        saver.after_step(step)
        files(tmp_path / "foo-step00000001-state", "cat.png")
    assert "foo-step00000002-state" not in names_in(tmp_path)
    assert (tmp_path / "foo-step00000001-state/cat.png").exists()


def test_a_model_that_can_be_saved_nowhere_leaves_its_state(tmp_path, monkeypatch):
    refuges = tmp_path / "refuges"
    refuges.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(refuges))
    saver = checkpointer(tmp_path / "out", save_every_n_steps=10)

    def not_finite(path, step, epoch):
        raise NonFiniteError("x holds NaN or infinity; the file was not written")

    saver.write_model, saver.write_state = not_finite, lambda path, step: path.mkdir(parents=True)
    with pytest.raises(NonFiniteError, match="x holds NaN.*the state alone is saved: .*out/foo-state"):
        saver.at_end(1000)
    assert (tmp_path / "out/foo-state").is_dir() and names_in(refuges) == []


def test_a_state_that_does_not_fit_is_not_where_the_model_is(tmp_path, monkeypatch):
    refuges = tmp_path / "refuges"
    refuges.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(refuges))
    saver = checkpointer(tmp_path, save_state=True)

    def only_elsewhere(path, step):
        if path.parent == tmp_path:
            raise OptionError("--output_dir", "the disk is full")
        path.mkdir()

    saver.write_state = only_elsewhere
    with pytest.raises(OptionError, match="the trained model is in .*foo.safetensors and the state is in .*foo-state"):
        saver.at_end(1000)
    assert len(list(refuges.glob("training-*/foo-state"))) == 1
