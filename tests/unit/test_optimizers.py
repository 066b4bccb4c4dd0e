"""The optimizer and schedule tables."""

import pytest
import torch

from library.options import OptionError
from library.targets.base import ParamGroup
from library.train.lr_schedulers import build_lr_scheduler
from library.train.optimizers import build_optimizer, parse_arguments
from library.train.options import OptimizerOptions, ScheduleOptions


def groups(unet_lr=None):
    parameters = [torch.nn.Parameter(torch.ones(4, 4)) for _ in range(2)]
    return [ParamGroup("text encoder", (parameters[0],), None), ParamGroup("unet", (parameters[1],), unet_lr)]


def build(name="", *args, unet_lr=None, lr=1e-3):
    options = OptimizerOptions(optimizer_type=name, optimizer_args=args or None, learning_rate=lr)
    return build_optimizer(options, groups(unet_lr))


def test_default_is_adamw_and_groups_keep_their_rates():
    built = build(unet_lr=0.5)
    assert type(built.optimizer) is torch.optim.AdamW
    assert [group["lr"] for group in built.optimizer.param_groups] == [1e-3, 0.5]
    assert built.description == "torch.optim.adamw.AdamW"


@pytest.mark.parametrize("name", ["adamw", "AdamW", "ADAMW", "torch.optim.AdamW"])
def test_names_of_the_trade_in_any_case_and_class_paths(name):
    assert type(build(name).optimizer) is torch.optim.AdamW


def test_other_torch_optimizers_by_class_name():
    assert type(build("RMSprop").optimizer) is torch.optim.RMSprop


def test_sgd_nesterov_adds_momentum_unless_given():
    assert build("SGDNesterov").optimizer.defaults["momentum"] == 0.9
    built = build("sgdnesterov", "momentum=0.5")
    assert built.optimizer.defaults["momentum"] == 0.5 and built.optimizer.defaults["nesterov"]
    assert built.description == "torch.optim.sgd.SGD(nesterov=True,momentum=0.5)"


def test_adafactor_chooses_its_own_rate_unless_told_not_to():
    own = build("AdaFactor", unet_lr=0.5)
    assert own.chooses_own_rate and all(group["lr"] is None for group in own.optimizer.param_groups)
    given = build("adafactor", "relative_step=False", "scale_parameter=False")
    assert not given.chooses_own_rate and given.optimizer.param_groups[0]["lr"] == 1e-3
    warm = build("adafactor", "relative_step=False", "warmup_init=True")
    assert warm.chooses_own_rate


@pytest.mark.parametrize("name", ["AdamW", "SGDNesterov", "AdaFactor", "torch.optim.RAdam"])
def test_each_lowers_a_loss(name):
    built = build(name, lr=0.05)
    parameter = built.optimizer.param_groups[1]["params"][0]
    for _ in range(20):
        (parameter**2).sum().backward()
        built.optimizer.step()
        built.optimizer.zero_grad()
    assert parameter.square().sum() < 16


@pytest.mark.parametrize(
    ("name", "args", "words"),
    [
        ("AdmaW", (), ["--optimizer_type", "'AdmaW'", "AdamW?"]),
        ("no_such_package.Fancy", (), ["--optimizer_type", "no_such_package", "pip install"]),
        ("torch.optim.Nope", (), ["--optimizer_type", "Nope"]),
        ("AdamW", ("betas",), ["--optimizer_args", "'betas'", "name=value"]),
        ("AdamW", ("betas=big",), ["--optimizer_args", "'big'", "betas"]),
        ("AdamW", ("speed=3",), ["--optimizer_args", "AdamW", "speed"]),
    ],
)
def test_mistakes(name, args, words):
    with pytest.raises(OptionError) as error:
        build(name, *args)
    assert all(word in str(error.value) for word in words)


def test_arguments_are_python_values_and_may_contain_equals():
    parsed = parse_arguments(["betas=0.9,0.99", "amsgrad=True", "name='a=b'", "eps=1e-6"], "--optimizer_args")
    assert parsed == {"betas": (0.9, 0.99), "amsgrad": True, "name": "a=b", "eps": 1e-6}


def rates(name, steps=10, lr=1.0, **kwargs):
    built = build(lr=lr)
    scheduler = build_lr_scheduler(ScheduleOptions(lr_scheduler=name, **kwargs), built, steps)
    seen = []
    for _ in range(steps):
        seen.append(built.optimizer.param_groups[0]["lr"])
        built.optimizer.step()
        scheduler.step()
    return seen, built.optimizer.param_groups[0]["lr"]


def test_constant():
    assert set(rates("constant")[0]) == {1.0}


@pytest.mark.parametrize(("name", "end"), [("linear", 0.0), ("cosine", 0.0), ("polynomial", 1e-7)])
def test_decays_end_exactly_at_the_last_step(name, end):
    seen, last = rates(name)
    assert seen == sorted(seen, reverse=True) and seen[0] == 1.0
    assert last == pytest.approx(end, abs=1e-12)


@pytest.mark.parametrize("name", ["linear", "cosine", "cosine_with_restarts", "polynomial", "constant_with_warmup"])
def test_warm_up_is_counted_in_updates(name):
    seen, _ = rates(name, lr_warmup_steps=4)
    assert seen[:4] == pytest.approx([0.0, 0.25, 0.5, 0.75]) and seen[4] == pytest.approx(1.0)


def test_constant_with_warm_up_steps_warms_up():
    assert rates("constant", lr_warmup_steps=2)[0][:3] == pytest.approx([0.0, 0.5, 1.0])


def test_restarts():
    seen, _ = rates("cosine_with_restarts", lr_scheduler_num_cycles=2)
    assert seen[0] == seen[5] == pytest.approx(1.0)


def test_piecewise_and_class_paths():
    seen, _ = rates("piecewise_constant", lr_scheduler_args=('step_rules="1:3,0.1"',))
    assert seen[:4] == pytest.approx([1.0, 1.0, 1.0, 0.1])
    seen, _ = rates("constant", lr_scheduler_type="StepLR", lr_scheduler_args=("step_size=5", "gamma=0.5"))
    assert seen[4:6] == [1.0, 0.5]


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"lr_scheduler": "cosin"}, ["--lr_scheduler", "'cosin'", "cosine"]),
        ({"lr_scheduler": "linear", "lr_warmup_steps": 11}, ["--lr_warmup_steps", "11", "10"]),
        ({"lr_scheduler": "piecewise_constant"}, ["--lr_scheduler", "step_rules"]),
        ({"lr_scheduler": "cosine", "lr_scheduler_args": ("speed=1",)}, ["--lr_scheduler_args", "speed"]),
        ({"lr_scheduler_type": "Nope"}, ["--lr_scheduler_type", "Nope"]),
        ({"lr_scheduler_type": "StepLR"}, ["--lr_scheduler_args", "StepLR", "step_size"]),
    ],
)
def test_schedule_mistakes(kwargs, words):
    with pytest.raises(OptionError) as error:
        build_lr_scheduler(ScheduleOptions(**kwargs), build(), 10)
    assert all(word in str(error.value) for word in words)


def test_no_schedule_where_the_optimizer_chooses():
    assert build_lr_scheduler(ScheduleOptions(lr_scheduler="cosine"), build("AdaFactor"), 10) is None
