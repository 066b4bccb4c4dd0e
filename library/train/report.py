"""The table that is printed before a run starts: what is trained, how long, what is written when."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from library.data.dataset import TrainingData
from library.targets.base import ParamGroup
from library.train.config import RunConfig
from library.train.plan import TrainPlan


def table(rows: Iterable[tuple[str, str]]) -> str:
    """Two aligned columns."""
    rows = list(rows)
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in rows)


def trained_rows(groups: Sequence[ParamGroup], default_lr: float, chooses_own_rate: bool) -> Iterable[tuple[str, str]]:
    for group in groups:
        count = sum(parameter.numel() for parameter in group.parameters)
        rate = "chosen by the optimizer" if chooses_own_rate else f"{default_lr if group.lr is None else group.lr:g}"
        yield f"trained: {group.name}", f"{len(group.parameters)} tensors, {count:,} parameters, learning rate {rate}"


def plan_rows(data: TrainingData, plan: TrainPlan, num_processes: int, start_step: int) -> Iterable[tuple[str, str]]:
    reg = f" + {data.num_reg_images} regularisation" if data.num_reg_images else ""
    yield "images x repeats", f"{data.num_train_images}{reg}"
    sizes = dict.fromkeys(str(dataset.config.batch_size) for dataset in data.datasets)
    processes = f" x {num_processes} processes" if num_processes > 1 else ""
    yield "batches per epoch", f"{plan.batches_per_epoch} (batch size {' and '.join(sizes)}{processes})"
    accumulation = f" (each of {plan.accumulation} batches)" if plan.accumulation > 1 else ""
    epochs = "1 epoch" if plan.epochs == 1 else f"{plan.epochs} epochs"
    yield "steps", f"{plan.steps} in {epochs} of {plan.steps_per_epoch}{accumulation}"
    if start_step:
        yield "goes on after step", str(start_step)


def saving_rows(config: RunConfig, plan: TrainPlan, final: Path, file_bytes: int) -> Iterable[tuple[str, str]]:
    due = []
    if plan.save_every_n_epochs:
        due.append(f"every {plan.save_every_n_epochs} epochs")
    if plan.save_every_n_steps:
        due.append(f"every {plan.save_every_n_steps} steps")
    due.append("at the end")
    state = ", with state" if config.saving.save_state else ""
    yield "saved", f"{' and '.join(due)}: {final} ({file_bytes / 2**20:.1f} MiB each){state}"
