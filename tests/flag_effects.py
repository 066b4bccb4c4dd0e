"""What a flag can do to a run, as checks of two runs: one without the flag and one with it."""

from __future__ import annotations

import contextlib
import multiprocessing
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from library.models import vae
from library.train import loop
from tests.runs import metadata_of


@dataclass
class Inside:
    """What a run was made of, as seen while it trained."""

    attention: set[str] = field(default_factory=set)  # classes that compute the U-Net's
    updates: str = ""  # the class that applies gradients
    gradients_left: int = 0  # after the backward passes of an update
    checkpointing: int = 0  # modules that compute again in the backward pass
    workers: int = 0  # processes that make batches
    encoded: list[int] = field(default_factory=list)  # images of each call of the VAE's encoder


@contextlib.contextmanager
def watching() -> Iterator[Inside]:
    """Inside the block a run of this process fills what is given out."""
    seen = Inside()
    others = len(multiprocessing.active_children())

    def update(run: Any, batches: Any, step: int, update: Any = loop.update) -> Any:
        def clip(clip: Any = run.updates.clip) -> torch.Tensor:
            seen.gradients_left = sum(parameter.grad is not None for parameter in run.parameters)
            return clip()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(run.updates, "clip", clip)
            record = update(run, batches, step)
        seen.attention = {type(processor).__name__ for processor in run.bundle.unet.attn_processors.values()}
        seen.updates = type(run.updates).__name__
        parts = [run.bundle.unet, *run.bundle.text_encoders]
        seen.checkpointing = sum(getattr(m, "gradient_checkpointing", False) for part in parts for m in part.modules())
        seen.workers = len(multiprocessing.active_children()) - others
        return record

    def encode(model: Any, images: torch.Tensor, noise: torch.Tensor, encode: Any = vae.encode) -> torch.Tensor:
        seen.encoded.append(len(images))
        return encode(model, images, noise)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "update", update)
        patch.setattr(vae, "encode", encode)
        yield seen


@dataclass(frozen=True)
class Outcome:
    """What a run left behind."""

    code: int
    folder: Path
    text: str  # of the console and the log
    inside: Inside

    @property
    def file(self) -> Path:
        return self.folder / "net.safetensors"

    def tensors(self) -> dict[str, torch.Tensor]:
        assert self.code == 0, self.text[-2000:]
        return load_file(self.file)

    def names(self) -> set[str]:
        return {str(path.relative_to(self.folder)) for path in self.folder.rglob("*")}


Check = Callable[[Outcome, Outcome], None]


# ---------------------------------------------------------------------------------------------- what can be seen


def learns_otherwise(without: Outcome, with_: Outcome) -> None:
    before, after = without.tensors(), with_.tensors()
    assert all(tensor.isfinite().all() for tensor in after.values())
    assert before.keys() != after.keys() or any(not torch.equal(before[name], after[name]) for name in before)


def learns_the_same(without: Outcome, with_: Outcome) -> None:
    before, after = without.tensors(), with_.tensors()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def learns_nearly_the_same(without: Outcome, with_: Outcome) -> None:
    before, after = without.tensors(), with_.tensors()
    assert all(torch.allclose(before[name].float(), after[name].float(), atol=1e-4) for name in before)


def writes(*patterns: str) -> Check:
    """Files that match, as paths below the output folder, are there with the flag only; training is the same."""

    def check(without: Outcome, with_: Outcome) -> None:
        if without.file.exists() and with_.file.exists():
            learns_the_same(without, with_)
        for pattern in patterns:
            found = [{name for name in run.names() if re.fullmatch(pattern, name)} for run in (without, with_)]
            assert found[1] and not found[0], (pattern, found, with_.names())

    return check


def writes_no(pattern: str) -> Check:
    def check(without: Outcome, with_: Outcome) -> None:
        writes(pattern)(with_, without)

    return check


def has_inside(**expected: Any) -> Check:
    """What is seen while a run trains is this with the flag, and something else without it."""

    def check(without: Outcome, with_: Outcome) -> None:
        for name, value in expected.items():
            before, after = getattr(without.inside, name), getattr(with_.inside, name)
            assert after == value != before, (name, before, after)

    return check


def computes_attention_with(processor: str) -> Check:
    """The U-Net's attention is of this class, with the flag and without it: the flag names the default."""

    def check(without: Outcome, with_: Outcome) -> None:
        assert without.inside.attention == with_.inside.attention == {processor}

    return check


def computes_again(without: Outcome, with_: Outcome) -> None:
    """Gradient checkpointing is on in both models, with the flag only."""
    assert with_.inside.checkpointing >= 2 > without.inside.checkpointing == 0


def marks(**expected: Any) -> Check:
    """Metadata keys (`__` stands for a dot) have these values with the flag, and others without it."""

    def check(without: Outcome, with_: Outcome) -> None:
        assert with_.code == 0, with_.text[-2000:]
        before, after = metadata_of(without.file), metadata_of(with_.file)
        for key, value in expected.items():
            name = key.replace("__", ".")
            assert after.get(name) == value and before.get(name) != value, (name, before.get(name), after.get(name))

    return check


def says(text: str) -> Check:
    def check(without: Outcome, with_: Outcome) -> None:
        assert with_.code == 0 and text in with_.text, with_.text[-3000:]
        assert text not in without.text

    return check


def refuses(text: str) -> Check:
    """With the flag the run does not start, and says why."""

    def check(without: Outcome, with_: Outcome) -> None:
        assert with_.code == 2 and text in with_.text, (with_.code, with_.text[-1000:])
        assert without.code == 0

    return check


def runs(without: Outcome, with_: Outcome) -> None:
    """With the flag the run works that it makes possible, and does not without it."""
    assert with_.code == 0, with_.text[-2000:]
    assert without.code == 2, without.code


def both(*checks: Check) -> Check:
    def check(without: Outcome, with_: Outcome) -> None:
        for one in checks:
            one(without, with_)

    return check


def of_rank(rank: int) -> Check:
    def check(_: Outcome, with_: Outcome) -> None:
        assert {t.shape[0] for name, t in with_.tensors().items() if "lora_down" in name} == {rank}

    return check


def of_dtype(dtype: torch.dtype) -> Check:
    def check(without: Outcome, with_: Outcome) -> None:
        assert {t.dtype for t in with_.tensors().values()} == {dtype} != {t.dtype for t in without.tensors().values()}

    return check


def only_parts(*parts: str) -> Check:
    def check(_: Outcome, with_: Outcome) -> None:
        assert {name.split("_")[1] for name in with_.tensors()} == set(parts)

    return check


def says_less(without: Outcome, with_: Outcome) -> None:
    before, after = (
        {name for name in metadata_of(run.file) if name.startswith("ss_")} for run in (without, with_)
    )  # fmt: skip
    assert after < before and len(after) <= 6
