"""Steps, epochs and save points."""

import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from library.options import OptionError
from library.train.checkpoints import Checkpointer
from library.train.options import TrainingOptions
from library.train.output_options import SavingOptions
from library.train.plan import TrainPlan
from library.train.resume import FileNames


def plan_of(batches, **kwargs):
    saving = {name: kwargs.pop(name) for name in list(kwargs) if name.startswith("save")}
    return TrainPlan.make(TrainingOptions(**kwargs), SavingOptions(output_dir=Path("x"), **saving), batches)


def test_epochs_from_steps_and_steps_from_epochs():
    assert plan_of(10, max_train_steps=25).epochs == 3
    assert plan_of(10, max_train_epochs=3).steps == 30
    assert (
        plan_of(10, max_train_epochs=3, gradient_accumulation_steps=4).steps == 9
    )  # 3 updates an epoch: 4 + 4 + 2 batches


@given(batches=st.integers(1, 50), accumulation=st.integers(1, 8), steps=st.integers(1, 200))
def test_every_batch_of_an_epoch_belongs_to_exactly_one_update(batches, accumulation, steps):
    plan = plan_of(batches, max_train_steps=steps, gradient_accumulation_steps=accumulation)
    expected = 0
    for step in range(1, plan.steps_per_epoch + 1):
        position = plan.position_after(step - 1)
        assert (position.epoch, position.batch_index) == (1, expected)
        expected += plan.batches_of(step)
    assert expected == batches
    assert plan.position_after(plan.steps_per_epoch) == plan.position_after(0).__class__(2, 0)
    assert plan.epoch_of(plan.steps) == plan.epochs


def test_save_points_leave_the_end_to_the_final_file():
    plan = plan_of(10, max_train_steps=40, save_every_n_steps=10, save_every_n_epochs=2)
    assert [step for step in range(1, 41) if plan.saves_at(step)] == [10, 20, 30]
    assert [epoch for epoch in range(1, 5) if plan.saves_after_epoch(epoch)] == [2]


def test_save_n_epoch_ratio():
    assert plan_of(1, max_train_steps=10, save_n_epoch_ratio=3).save_every_n_epochs == 3
    assert plan_of(1, max_train_steps=2, save_n_epoch_ratio=5).save_every_n_epochs == 1


def checkpointer(folder, **kwargs):
    plan = plan_of(1, max_train_steps=kwargs.pop("max_train_steps", 1000), **kwargs)
    saving = SavingOptions(output_dir=folder, output_name="foo", **kwargs)
    return Checkpointer(
        saving,
        plan,
        FileNames.of(saving),
        write_model=lambda path, step, epoch: path.touch(),
        write_best=lambda path, step, epoch: path.touch(),
        write_state=lambda path, step: path.mkdir(),
    )


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_names(tmp_path):
    names = FileNames(tmp_path, "foo", ".safetensors")
    assert names.epoch_file(1).name == "foo-000001.safetensors"
    assert names.step_file(100).name == "foo-step00000100.safetensors"
    assert names.final_file().name == "foo.safetensors"
    assert names.state_of(names.epoch_file(1)).name == "foo-000001-state"
    assert names.state_of(names.step_file(100)).name == "foo-step00000100-state"
    assert names.state_of(names.final_file()).name == "foo-state"
    nameless = FileNames(tmp_path, None, ".pt")
    assert [nameless.epoch_file(1).name, nameless.step_file(100).name, nameless.final_file().name] == [
        "epoch-000001.pt", "at-step00000100.pt", "last.pt",
    ]  # fmt: skip


def test_a_name_with_dots_keeps_them(tmp_path):
    names = FileNames(tmp_path, "foo.v1.2", ".safetensors")
    assert names.state_of(names.final_file()).name == "foo.v1.2-state"


@pytest.mark.parametrize(("after", "left"), [(40, [10, 20, 30, 40]), (50, [20, 30, 40, 50]), (60, [30, 40, 50, 60])])
def test_rotation_by_steps(tmp_path, after, left):
    saver = checkpointer(tmp_path, save_every_n_steps=10, save_last_n_steps=30)
    for step in range(1, after + 1):
        saver.after_step(step)
    assert names_in(tmp_path) == [f"foo-step{step:08d}.safetensors" for step in left]


def test_rotation_by_epochs(tmp_path):
    saver = checkpointer(tmp_path, save_every_n_epochs=2, save_last_n_epochs=3)
    for epoch in range(1, 9):
        saver.after_epoch(epoch, epoch)
    assert names_in(tmp_path) == [f"foo-{epoch:06d}.safetensors" for epoch in (4, 6, 8)]


def test_states_rotate_by_their_own_age(tmp_path):
    saver = checkpointer(
        tmp_path, save_every_n_steps=10, save_last_n_steps=30, save_last_n_steps_state=10, save_state=True
    )
    for step in range(1, 51):
        saver.after_step(step)
    states = [name for name in names_in(tmp_path) if name.endswith("-state")]
    assert states == ["foo-step00000040-state", "foo-step00000050-state"]


def test_a_full_disk_on_the_way_does_not_end_the_run(tmp_path, caplog):
    saver = checkpointer(tmp_path, save_every_n_steps=10)

    def full(path, step, epoch):
        raise OptionError("--output_dir", "the disk is full")

    saver.write_model = full
    saver.after_step(10)
    assert "net" not in caplog.text and "foo-step00000010.safetensors was not saved, training goes on" in caplog.text


def test_a_full_disk_at_the_end_loses_nothing(tmp_path):
    saver = checkpointer(tmp_path / "out", save_every_n_steps=10)
    written = []

    def only_elsewhere(path, step, epoch):
        if path.parent == tmp_path / "out":
            raise OptionError("--output_dir", "the disk is full")
        path.write_text("weights")
        written.append(path)

    saver.write_model = only_elsewhere
    with pytest.raises(OptionError, match="the disk is full.*the trained model is in"):
        saver.at_end(1000)
    (refuge,) = written
    assert refuge.read_text() == "weights" and refuge.name == "foo.safetensors"
    shutil.rmtree(refuge.parent)
