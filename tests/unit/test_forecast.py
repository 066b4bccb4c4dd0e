"""What settings come to over the steps: rates, the optimizer's memory, files."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from library.options import OptionError
from library.targets.base import ParamGroup
from library.train.checkpoints import Checkpointer
from library.train.forecast import (
    check_free_space,
    files_to_come,
    most_on_disk,
    quietly,
    rate_courses,
    stand_ins,
    state_bytes_per_parameter,
    try_out,
)
from library.train.lr_schedulers import build_lr_scheduler
from library.train.optimizers import build_optimizer
from library.train.options import OptimizerOptions, ScheduleOptions
from library.train.output_options import SavingOptions
from library.train.plan import TrainPlan
from library.train.resume import FileNames


@dataclass
class Settings:
    """The groups of a RunConfig that rates depend on."""

    optimizer: OptimizerOptions
    schedule: ScheduleOptions


def groups():
    return [
        ParamGroup("text encoder", (torch.nn.Parameter(torch.zeros(2)),), 5e-5),
        ParamGroup("unet", (torch.nn.Parameter(torch.zeros(2)),), None),
    ]


SCHEDULES = {
    "constant": {}, "linear": {}, "cosine": {"lr_warmup_steps": 5},
    "cosine_with_restarts": {"lr_scheduler_num_cycles": 3}, "polynomial": {"lr_scheduler_power": 2},
    "piecewise_constant": {"lr_scheduler_args": ("step_rules='1:10,0.1:20,0.01'",)},
}  # fmt: skip


@pytest.mark.parametrize("name", [*SCHEDULES, "of somebody else"])
def test_rates_are_those_of_the_run(name):
    """Followed update by update with the run's own classes."""
    steps = 30
    schedule = (
        ScheduleOptions(lr_scheduler_type="torch.optim.lr_scheduler.StepLR", lr_scheduler_args=("step_size=7",))
        if name == "of somebody else"
        else ScheduleOptions(lr_scheduler=name, **SCHEDULES[name])
    )
    options = OptimizerOptions(learning_rate=1e-4)
    built = build_optimizer(options, groups())
    scheduler = build_lr_scheduler(schedule, built, steps)
    expected = []
    for _ in range(steps):
        expected.append([group["lr"] for group in built.optimizer.param_groups])
        built.optimizer.step()
        scheduler.step()
    courses = rate_courses(Settings(options, schedule), groups(), steps)
    assert [course.group for course in courses] == ["text encoder", "unet"]
    for index, course in enumerate(courses):
        assert [update for update, _ in course.points] == list(range(1, steps + 1))
        assert [rate for _, rate in course.points] == pytest.approx([rates[index] for rates in expected])
        assert (course.first, course.last) == pytest.approx((expected[0][index], expected[-1][index]))
        assert course.peak == pytest.approx(max(rates[index] for rates in expected))


def test_an_optimizer_with_its_own_rate_has_no_course():
    options = OptimizerOptions(optimizer_type="AdaFactor")
    assert rate_courses(Settings(options, ScheduleOptions()), groups(), 10) == []


@pytest.mark.parametrize(("name", "size"), [("AdamW", 8), ("SGDNesterov", 4), ("torch.optim.SGD", 0)])
def test_what_an_optimizer_keeps(name, size):
    built = build_optimizer(OptimizerOptions(optimizer_type=name), stand_ins(groups()))
    assert state_bytes_per_parameter(built) == size


def test_an_optimizer_that_cannot_be_tried():
    built = build_optimizer(OptimizerOptions(optimizer_type="torch.optim.LBFGS"), stand_ins(groups()[:1]))
    assert state_bytes_per_parameter(built) is None


FAIL_LATER = [
    ({"lr_scheduler_type": "StepLR", "lr_scheduler_args": ("step_size=0",)}, {}, "--lr_scheduler_args: StepLR fails"),
    ({"lr_scheduler_type": "ExponentialLR", "lr_scheduler_args": ("gamma='x'",)}, {}, "ExponentialLR fails after"),
    (
        {"lr_scheduler_type": "OneCycleLR", "lr_scheduler_args": ("max_lr=1.0", "total_steps=2")},
        {},
        "OneCycleLR fails after step . of 9",
    ),
    ({}, {"optimizer_type": "torch.optim.SparseAdam"}, "--optimizer_type: SparseAdam can't make a step"),
]


@pytest.mark.parametrize(("schedule", "optimizer", "message"), FAIL_LATER)
def test_what_would_fail_at_a_later_step_is_said_before_the_first(schedule, optimizer, message):
    config = Settings(OptimizerOptions(**optimizer), ScheduleOptions(**schedule))
    with pytest.raises(OptionError, match=message):
        try_out(config, groups(), 9, torch.device("cpu"))
    try_out(Settings(OptimizerOptions(), ScheduleOptions("cosine")), groups(), 9, torch.device("cpu"))


def test_quiet_is_over_afterwards(caplog):
    with caplog.at_level(logging.INFO):
        with quietly():
            logging.getLogger("library.x").warning("unheard")
        logging.getLogger("library.x").warning("heard")
    assert caplog.messages == ["heard"]


# ---------------------------------------------------------------------------------------------- files


@settings(max_examples=60, deadline=None)
@given(
    steps=st.integers(1, 40),
    batches=st.integers(1, 7),
    every_steps=st.none() | st.integers(1, 9),
    every_epochs=st.none() | st.integers(1, 3),
    last_steps=st.none() | st.integers(1, 15),
    last_steps_state=st.none() | st.integers(1, 15),
    last_epochs=st.none() | st.integers(1, 3),
)
def test_files_are_those_that_a_run_leaves(
    tmp_path_factory, steps, batches, every_steps, every_epochs, last_steps, last_steps_state, last_epochs
):
    folder = tmp_path_factory.mktemp("files")
    saving = SavingOptions(
        output_dir=folder, output_name="net", save_state=True, save_last_n_steps=last_steps,
        save_last_n_steps_state=last_steps_state, save_last_n_epochs=last_epochs,
    )  # fmt: skip
    plan = TrainPlan(steps, -(-steps // batches), batches, 1, every_steps, every_epochs)
    names = FileNames.of(saving)
    most = written = 0

    def write(path: Path, step: int, epoch: int) -> None:
        nonlocal most, written
        path.write_bytes(b"12345")
        written += 1

    def write_state(path: Path, step: int) -> None:
        nonlocal most
        path.mkdir()
        most = max(most, sum(5 if file.is_file() else 1000 for file in folder.iterdir()))

    checkpointer = Checkpointer(saving, plan, names, write, write, write_state)
    for step in range(1, steps + 1):
        checkpointer.after_step(step)
        if plan.ends_epoch(step):
            checkpointer.after_epoch(plan.epoch_of(step), step)
    checkpointer.at_end(steps)
    files = files_to_come(plan, saving, names, start_step=0, has_average=False)
    assert len(files) == written
    left = {file.path.name for file in files if file.removed_at is None}
    left |= {names.state_of(file.path).name for file in files if file.state_removed_at is None}
    assert left == {path.name for path in folder.iterdir()}
    assert most_on_disk(files, 5, 1000) == most


def test_a_resumed_run_writes_what_is_left(tmp_path):
    saving = SavingOptions(output_dir=tmp_path)
    plan = TrainPlan(10, 2, 5, 1, 3, None)
    files = files_to_come(plan, saving, FileNames.of(saving), start_step=6, has_average=True)
    assert [file.step for file in files] == [9, 10]
    assert most_on_disk(files, 100, 0) == 400, "each with its average"


def test_too_little_space_is_an_error(tmp_path):
    check_free_space(tmp_path, 10, 10)
    with pytest.raises(OptionError, match="--output_dir: .* one file takes 20 MiB; free some space"):
        check_free_space(tmp_path, 10 * 2**20, 20 * 2**20)
    with pytest.raises(OptionError, match="one file with its state takes 20 MiB"):
        check_free_space(tmp_path, 10 * 2**20, 20 * 2**20, with_state=True)
