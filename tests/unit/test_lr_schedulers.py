"""The table of schedules: where each begins and ends, in optimizer updates."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from library.options import OptionError, build
from library.targets.base import ParamGroup
from library.train.lr_schedulers import TABLE, build_lr_scheduler
from library.train.optimizers import build_optimizer
from library.train.options import LR_SCHEDULERS, OptimizerOptions, ScheduleOptions


def optimizer(lr=1.0, name="SGD"):
    parameter = torch.nn.Parameter(torch.ones(2))
    return build_optimizer(OptimizerOptions(name, learning_rate=lr), [ParamGroup("unet", (parameter,), None)])


def rates(name, steps=10, lr=1.0, **options):
    """(the rates of each update, the rate after the last)."""
    built = optimizer(lr)
    scheduler = build_lr_scheduler(build(ScheduleOptions, {"lr_scheduler": name, **options}), built, steps)
    seen = []
    for _ in range(steps):
        seen.append(built.optimizer.param_groups[0]["lr"])
        built.optimizer.step()
        scheduler.step()
    return seen, built.optimizer.param_groups[0]["lr"]


def test_every_name_has_its_schedule():
    assert set(TABLE) | {"adafactor"} == set(LR_SCHEDULERS)


def test_constant():
    assert set(rates("constant")[0]) == {1.0}


@pytest.mark.parametrize(
    ("name", "options", "end"),
    [
        ("linear", {}, 0.0),
        ("cosine", {}, 0.0),
        ("cosine_with_restarts", {}, 0.0),
        ("polynomial", {}, 1e-7),
        ("polynomial", {"lr_scheduler_power": 2.0}, 1e-7),
        ("polynomial", {"lr_scheduler_args": ["lr_end=0.25"]}, 0.25),
        ("cosine_with_min_lr", {"lr_scheduler_min_lr_ratio": 0.1}, 0.1),
        ("cosine_with_min_lr", {"lr_scheduler_args": ["min_lr=0.2"]}, 0.2),
        ("warmup_stable_decay", {"lr_decay_steps": 4}, 0.0),
        ("warmup_stable_decay", {"lr_decay_steps": "40%", "lr_scheduler_min_lr_ratio": 0.1}, 0.1),
        ("inverse_sqrt", {"lr_scheduler_timescale": 5}, (15 / 5) ** -0.5),
    ],
)
def test_first_and_last_rate(name, options, end):
    seen, last = rates(name, **options)
    assert seen == sorted(seen, reverse=True) and seen[0] == 1.0
    assert last == pytest.approx(end, abs=1e-12)


def test_the_middle_of_a_cosine_and_of_a_power():
    assert rates("cosine")[0][5] == pytest.approx(0.5)
    assert rates("polynomial", lr_scheduler_power=2.0)[0][5] == pytest.approx(0.25, abs=1e-6)
    assert rates("cosine_with_min_lr", lr_scheduler_min_lr_ratio=0.2)[0][5] == pytest.approx(0.6)


WARMING = [name for name in TABLE if name not in ("constant", "piecewise_constant")]


@pytest.mark.parametrize("name", [*WARMING, "constant"])
@pytest.mark.parametrize("warmup", [4, "4", 0.4, "40%", 4.0])
def test_warm_up_is_counted_in_updates(name, warmup):
    end = {"lr_scheduler_min_lr_ratio": 0.0} if name in ("cosine_with_min_lr", "warmup_stable_decay") else {}
    seen, _ = rates(name, lr_warmup_steps=warmup, **end)
    assert seen[:4] == pytest.approx([0.0, 0.25, 0.5, 0.75]) and seen[4] == pytest.approx(1.0)


@pytest.mark.parametrize("name", [*WARMING, "constant"])
def test_a_warm_up_longer_than_the_run_is_cut_off_with_it(name):
    end = {"lr_scheduler_min_lr_ratio": 0.0} if name in ("cosine_with_min_lr", "warmup_stable_decay") else {}
    options = build(ScheduleOptions, {"lr_scheduler": name, "lr_warmup_steps": 20, **end})
    options.check_length(10)
    assert options.is_all_warmup(10) and not options.is_all_warmup(20)
    seen, last = rates(name, lr_warmup_steps=20, **end)
    assert [*seen, last] == pytest.approx([step / 20 for step in range(11)])


def test_stable_then_decay():
    seen, _ = rates("warmup_stable_decay", lr_warmup_steps=2, lr_decay_steps=0.3)
    assert seen[2:8] == [1.0] * 6 and 1.0 > seen[8] > seen[9] > 0


def test_restarts_and_half_waves():
    seen, _ = rates("cosine_with_restarts", lr_scheduler_num_cycles=2)
    assert seen[0] == seen[5] == pytest.approx(1.0)
    up_again = rates("cosine_with_min_lr", lr_scheduler_num_cycles=2, lr_scheduler_min_lr_ratio=0.0)
    assert up_again[0][5] == pytest.approx(0.0, abs=1e-12) and up_again[1] == pytest.approx(1.0)


def test_piecewise_and_class_paths():
    seen, _ = rates("piecewise_constant", lr_scheduler_args=['step_rules="1:3,0.1"'])
    assert seen[:4] == pytest.approx([1.0, 1.0, 1.0, 0.1])
    seen, _ = rates("constant", lr_scheduler_type="StepLR", lr_scheduler_args=["step_size=5", "gamma=0.5"])
    assert seen[4:6] == [1.0, 0.5]


@pytest.mark.parametrize("name", ["CosineAnnealingLR", "torch.optim.lr_scheduler.CosineAnnealingLR"])
def test_a_class_that_asks_for_the_length_of_the_run_is_told(name):
    seen, last = rates("constant", lr_scheduler_type=name)
    assert seen[5] == pytest.approx(0.5) and last == pytest.approx(0.0, abs=1e-12)


def test_torch_s_default_length_of_5_steps_is_not_taken():
    seen, last = rates("constant", lr_scheduler_type="PolynomialLR")
    assert seen[8] == pytest.approx(0.2) and last == pytest.approx(0.0, abs=1e-12)
    seen, _ = rates("constant", lr_scheduler_type="PolynomialLR", lr_scheduler_args=["total_iters=5"])
    assert seen[5] == pytest.approx(0.0, abs=1e-12)


def test_what_is_given_to_a_class_counts():
    _, last = rates("constant", lr_scheduler_type="CosineAnnealingLR", lr_scheduler_args=["T_max=20"])
    assert last == pytest.approx(0.5)
    seen, _ = rates("constant", lr_scheduler_type="OneCycleLR", lr_scheduler_args=["max_lr=2.0"])
    assert max(seen) == pytest.approx(2.0, rel=0.05) and seen[-1] < 0.01


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(
        ["linear", "cosine", "polynomial", "cosine_with_min_lr", "warmup_stable_decay", "inverse_sqrt"]
    ),
    steps=st.integers(2, 60),
    warmup=st.floats(0, 0.9),
    ratio=st.floats(0, 1),
    decay=st.floats(0, 0.1),
)
def test_up_then_down_and_never_outside(name, steps, warmup, ratio, decay):
    """Up to the rate asked for within the warm-up, down from there, never above it nor below 0."""
    options = {"lr_warmup_steps": warmup, "lr_scheduler_min_lr_ratio": ratio, "lr_decay_steps": decay}
    num_warmup = round(warmup * steps)
    if name == "warmup_stable_decay":
        options |= {"lr_warmup_steps": 0}  # with an end above 0 its warm-up starts there
        num_warmup = 0
    seen, last = rates(name, steps, lr=0.5, **options)
    peak = seen[num_warmup] if num_warmup < steps else last
    assert peak == pytest.approx(0.5)
    assert seen[: num_warmup + 1] == sorted(seen[: num_warmup + 1])
    falling = [*seen[num_warmup:], last]
    assert all(a >= b - 1e-12 for a, b in zip(falling, falling[1:], strict=False)) and falling[-1] >= 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lr_scheduler": "cosin"}, ["--lr_scheduler", "'cosin'", "cosine"]),
        (
            {"lr_scheduler": "warmup_stable_decay", "lr_warmup_steps": 12, "lr_decay_steps": 6},
            ["--lr_decay_steps", "0"],
        ),
        ({"lr_scheduler": "warmup_stable_decay", "lr_warmup_steps": 5, "lr_decay_steps": 6}, ["--lr_decay_steps", "5"]),
        ({"lr_scheduler": "piecewise_constant"}, ["--lr_scheduler", "step_rules"]),
        ({"lr_scheduler": "cosine", "lr_scheduler_args": ["speed=1"]}, ["--lr_scheduler_args", "speed"]),
        ({"lr_scheduler": "cosine_with_min_lr"}, ["--lr_scheduler_min_lr_ratio"]),
        ({"lr_scheduler_min_lr_ratio": 1.5}, ["--lr_scheduler_min_lr_ratio", "1.5"]),
        ({"lr_scheduler_timescale": 0}, ["--lr_scheduler_timescale", "0"]),
        ({"lr_warmup_steps": -1}, ["--lr_warmup_steps", "-1"]),
        ({"lr_warmup_steps": 1.5}, ["--lr_warmup_steps", "1.5", "10%"]),
        ({"lr_warmup_steps": "many"}, ["--lr_warmup_steps", "'many'"]),
        ({"lr_warmup_steps": "120%"}, ["--lr_warmup_steps", "'120%'"]),
        ({"lr_warmup_steps": True}, ["--lr_warmup_steps", "True"]),
        ({"lr_scheduler_type": "Nope"}, ["--lr_scheduler_type", "Nope"]),
        ({"lr_scheduler_type": "StepLR"}, ["--lr_scheduler_args", "StepLR", "step_size"]),
        ({"lr_scheduler_type": "ReduceLROnPlateau"}, ["--lr_scheduler_type", "metrics"]),
    ],
)
def test_mistakes(options, words):
    with pytest.raises(OptionError) as error:
        build_lr_scheduler(build(ScheduleOptions, options), optimizer(), 10)
    assert all(word in str(error.value) for word in words), error.value


def test_no_schedule_where_the_optimizer_chooses_or_averages():
    for name in ("AdaFactor", "AdamWScheduleFree"):
        assert build_lr_scheduler(ScheduleOptions(lr_scheduler="cosine"), optimizer(name=name), 10) is None


# ---------------------------------------------------------------------------------------------- notes


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lr_scheduler_power": 2.0}, ["--lr_scheduler_power has no effect", "polynomial"]),
        ({"lr_scheduler": "cosine", "lr_scheduler_num_cycles": 2}, ["--lr_scheduler_num_cycles has no effect"]),
        ({"lr_scheduler": "cosine", "lr_decay_steps": 5}, ["--lr_decay_steps has no effect", "warmup_stable_decay"]),
        ({"lr_scheduler_type": "StepLR", "lr_warmup_steps": 3}, ["--lr_warmup_steps has no effect beside"]),
        ({"lr_scheduler": "warmup_stable_decay"}, ["never falls without --lr_decay_steps"]),
    ],
)
def test_settings_without_effect_are_named(options, words):
    (note,) = build(ScheduleOptions, options).notes()
    assert all(word in note for word in words)


def test_what_has_an_effect_is_not_named():
    assert not ScheduleOptions().notes()
    every = {"lr_scheduler_min_lr_ratio": 0.1, "lr_decay_steps": 0.1, "lr_scheduler_num_cycles": 2}
    assert not build(ScheduleOptions, {"lr_scheduler": "warmup_stable_decay", "lr_warmup_steps": 5, **every}).notes()


def test_schedules_beside_optimizers():
    schedule, cosine = ScheduleOptions("adafactor"), ScheduleOptions("cosine", lr_warmup_steps=5)
    own, given = OptimizerOptions("AdaFactor"), OptimizerOptions("AdaFactor", ("relative_step=False",))
    assert not schedule.notes_beside(own)
    assert "chooses its own rate" in cosine.notes_beside(own)[0]
    assert "warmup_steps=100" in cosine.notes_beside(OptimizerOptions("SGDScheduleFree"))[0]
    assert not cosine.notes_beside(OptimizerOptions("AdamW"))
    for optimizer_options in (given, OptimizerOptions()):
        with pytest.raises(OptionError, match="--lr_scheduler: adafactor is AdaFactor's own"):
            schedule.notes_beside(optimizer_options)
    advice = " ".join(cosine.notes_beside(OptimizerOptions("AdaFactor", ("relative_step=False", "clip_threshold=2.0"))))
    assert all(word in advice for word in ("--max_grad_norm", "constant_with_warmup", "clip_threshold"))
