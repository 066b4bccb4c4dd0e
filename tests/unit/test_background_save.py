"""A file is written in a thread while training goes on; whoever changes the weights waits for it."""

from __future__ import annotations

import threading

import pytest
import torch

from library.options import OptionError
from library.targets.base import ParamGroup
from library.train.background_save import BackgroundSave
from library.train.optimizers import build_optimizer
from library.train.options import OptimizerOptions
from library.train.updates import PieceUpdates
from tests.unit.test_plan import checkpointer, names_in
from tests.unit.test_updates import make

CPU = torch.device("cpu")
LONG = 20.0  # seconds; nothing waits that long unless it is stuck


def test_it_goes_on_beside_and_is_told_where_it_was_begun():
    save, go_on, heard = BackgroundSave(CPU), threading.Event(), []
    threads = []

    def write() -> None:
        threads.append(threading.current_thread())
        assert go_on.wait(LONG)

    save.begin(write, lambda error: heard.append((error, threading.current_thread())))
    assert heard == [], "begin came back while the file was being written"
    go_on.set()
    save.wait()
    assert heard == [(None, threading.current_thread())] and threads != [threading.current_thread()]
    save.wait()
    assert len(heard) == 1


def test_one_file_at_a_time():
    save, order = BackgroundSave(CPU), []
    for name in "ab":
        save.begin(lambda name=name: order.append(f"write {name}"), lambda _, name=name: order.append(f"then {name}"))
    save.wait()
    assert order == ["write a", "then a", "write b", "then b"]


def test_what_a_user_can_mend_is_told_and_the_rest_is_raised():
    save, heard = BackgroundSave(CPU), []

    def fail(error: BaseException) -> None:
        raise error

    full = OptionError("", "the disk is full")
    save.begin(lambda: fail(full), heard.append)
    save.wait()
    assert heard == [full]
    save.begin(lambda: fail(ZeroDivisionError("a mistake of ours")), heard.append)
    with pytest.raises(ZeroDivisionError, match="a mistake of ours"):
        save.wait()
    assert heard == [full]
    save.wait()


@pytest.mark.parametrize("kind", ["together", "piece by piece", "fused"])
def test_an_update_waits_until_the_weights_are_written(kind: str):
    """As they were: the thread reads them while the forward and, but for fused updates, the backward pass run."""
    net, updates = make(fused=kind == "fused")
    if kind == "piece by piece":
        built = build_optimizer(OptimizerOptions(learning_rate=1e-2), [ParamGroup("", tuple(net.parameters()), None)])
        optimizer = updates.accelerator.prepare_optimizer(built.optimizer)
        given = updates.accelerator, optimizer, list(net.parameters())
        updates = PieceUpdates(built, *given, max_grad_norm=1.0, wide=built.wide, piece=100)
    before = [parameter.detach().clone() for parameter in net.parameters()]
    read: list[torch.Tensor] = []
    save, forward_is_done = BackgroundSave(CPU), threading.Event()

    def write() -> None:
        assert forward_is_done.wait(LONG)
        read.extend(parameter.detach().clone() for parameter in net.parameters())

    updates.before_change = save.wait
    save.begin(write, lambda _: None)
    with updates.micro_batch(net, is_last=True):
        loss = net(torch.randn(4, 8)).square().mean()
        forward_is_done.set()
        loss.backward()
    updates.clip()
    updates.apply(torch.tensor(True))
    assert len(read) == 4 and all(torch.equal(a, b) for a, b in zip(read, before, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(read, net.parameters(), strict=True)), "it was an update"


# ---------------------------------------------------------------------------------------------- rotation


class Beside:
    """Stands where a run begins its files; each is finished when the test says so."""

    def __init__(self) -> None:
        self.begun = []

    def __call__(self, path, step, epoch, then) -> bool:
        self.begun.append((path, then))
        return True

    def finish(self, error: OptionError | None = None) -> None:
        path, then = self.begun.pop()
        if error is None:
            path.touch()
        then(error)


def saver_beside(folder, **kwargs):
    saver = checkpointer(folder, save_every_n_steps=10, **kwargs)
    saver.begin_model = Beside()
    return saver, saver.begin_model


def test_an_old_file_goes_only_when_the_new_one_is_there(tmp_path, caplog):
    saver, beside = saver_beside(tmp_path, save_last_n_steps=10, save_state=True)
    for step in (10, 20):
        saver.after_step(step)
        beside.finish()
    saver.after_step(30)
    here = names_in(tmp_path)
    assert "foo-step00000010.safetensors" in here and "foo-step00000030.safetensors" not in here
    beside.finish()
    assert names_in(tmp_path) == [f"foo-step{step:08d}{end}" for step in (20, 30) for end in ("-state", ".safetensors")]


@pytest.mark.parametrize("is_beside", [True, False])
def test_no_file_is_removed_for_one_that_could_not_be_written(tmp_path, caplog, is_beside: bool):
    saver, beside = saver_beside(tmp_path, save_last_n_steps=10)
    full = OptionError("", "the disk is full")
    if not is_beside:
        saver.begin_model = lambda *_: False
    for step in (10, 20):
        saver.after_step(step)
        if is_beside:
            beside.finish()

    def fail(path, step, epoch):
        raise full

    write, saver.write_model = saver.write_model, fail
    saver.after_step(30)
    if is_beside:
        beside.finish(full)
    assert "foo-step00000030.safetensors was not saved, training goes on: the disk is full" in caplog.text
    assert names_in(tmp_path) == ["foo-step00000010.safetensors", "foo-step00000020.safetensors"]
    saver.write_model = write
    saver.after_step(40)
    if is_beside:
        beside.finish()
    assert names_in(tmp_path) == ["foo-step00000040.safetensors"], "what was due then is made up for"


def test_an_old_state_stays_when_the_new_one_could_not_be_written(tmp_path, caplog):
    saver, beside = saver_beside(tmp_path, save_last_n_steps=10, save_state=True)
    for step in (10, 20):
        saver.after_step(step)
        beside.finish()

    def fail(path, step):
        raise OptionError("--save_state", "the disk is full")

    saver.write_state = fail
    saver.after_step(30)
    beside.finish()
    assert "foo-step00000030-state was not saved, training goes on" in caplog.text
    assert "foo-step00000010-state" in names_in(tmp_path)


def test_only_one_process_removes(tmp_path):
    saver = checkpointer(tmp_path, save_every_n_steps=10, save_last_n_steps=10)
    saver.removes_old = False
    for step in (10, 20, 30):
        saver.after_step(step)
    assert len(names_in(tmp_path)) == 3
