"""The run itself as sections of a report: what is trained, how long, what is written, what memory it takes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.data.findings import DatasetUse, Findings
from library.options import Option, options_of
from library.targets.base import ParamGroup
from library.train.config import RunConfig
from library.train.course_options import ValidationOptions
from library.train.forecast import FileToCome, RateCourse, most_on_disk
from library.train.memory_estimate import MemoryEstimate
from library.train.plan import TrainPlan
from library.train.preview_options import PreviewOptions
from library.train.report import Bar, Block, Curve, Facts, Section, Table, Text
from library.train.resume import FileNames
from library.wording import counted

MIB, GIB = 2**20, 2**30
FILES_LISTED = 40


@dataclass(frozen=True)
class TrainedFacts:
    """What is known of the network before it learns."""

    groups: tuple[ParamGroup, ...]
    file_bytes: int  # of its tensors, as saved
    state_bytes: int  # of a state folder
    notes: tuple[str, ...] = ()  # what the target says of it beside numbers


@dataclass(frozen=True)
class ReportedRun:
    """Everything that a report says of a run, beside its data."""

    config: RunConfig
    names: FileNames
    plan: TrainPlan
    num_processes: int
    seed: int
    start_step: int
    model: str
    optimizer: str
    schedule: str
    chooses_own_rate: bool
    trained: TrainedFacts | None  # None: not known before the model is loaded
    rates: tuple[RateCourse, ...]
    files: tuple[FileToCome, ...]
    free_bytes: int
    memory: MemoryEstimate | None = None
    device_bytes: int | None = None  # of the GPU, where there is one


def run_sections(facts: ReportedRun, findings: Findings) -> list[Section]:
    """What the run will do."""
    return [_trained(facts), _steps(facts, findings), _files(facts, findings), _memory(facts)]


def size(number: float) -> str:
    """Bytes in words: "9.1 MiB"."""
    for unit, name in ((GIB, "GiB"), (MIB, "MiB")):
        if number >= unit:
            value = number / unit
            return f"{value:.0f} {name}" if value >= 100 else f"{value:.3g} {name}"
    return f"{number / 2**10:.3g} KiB"


# ---------------------------------------------------------------------------------------------- what is trained


def _trained(facts: ReportedRun) -> Section:
    default = facts.config.optimizer.learning_rate
    module = getattr(facts.config.target, "network_module", "the network")
    rows = [("base model", facts.model), *_network_row(facts.config.target)]
    if facts.trained is None:
        rows.append(("trained", f"not known before loading: {module} asks for the model's weights"))
    else:
        rows += [_group_row(group, default, facts) for group in facts.trained.groups]
        rows += [("how", note) for note in facts.trained.notes]
        updates = text_updates(facts)
        if 0 < updates < facts.plan.steps:
            rows.append(("text encoder", f"trained in the first {counted(int(updates), 'step')}, then left as it is"))
    rows += [("optimizer", facts.optimizer), ("schedule", facts.schedule), ("seed", str(facts.seed))]
    blocks: list[Block] = [Facts(tuple(rows), brief=True)]
    if facts.rates:
        rates = tuple(
            (course.group, f"{course.first:.3g}", f"{course.peak:.3g}", f"{course.last:.3g}") for course in facts.rates
        )
        blocks.append(Table(("learning rate", "first", "peak", "last"), rates, numbers=(1, 2, 3)))
        blocks.append(Curve("learning rate over the steps", tuple((c.group, c.points) for c in facts.rates)))
    return Section("What is trained", tuple(blocks))


def _network_row(target: Any) -> Iterator[tuple[str, str]]:
    """A network's rank and strength, which decide with the learning rate how fast it learns."""
    if getattr(target, "network_module", None) is None:
        return
    if target.dim_from_weights:
        yield "network", f"{target.network_module}, with the ranks and alphas of {target.network_weights}"
    elif size := target.described_size():
        yield "network", f"{target.network_module}, {size}"
    elif target.network_dim is not None:
        dim, alpha = target.network_dim, target.network_alpha or target.network_dim
        strength = f": strength {alpha / dim:.3g} (alpha / rank)" if dim > 0 else ""
        yield "network", f"{target.network_module}, rank {dim}, alpha {alpha:g}{strength}"
    else:
        yield "network", f"{target.network_module}, of its own rank, alpha {target.network_alpha:g}"


def text_updates(facts: ReportedRun) -> float:
    """How many updates, from the first one, train text encoders; infinite where nothing limits them."""
    updates: float = getattr(facts.config.target, "text_updates", math.inf)
    return updates


def _group_row(group: ParamGroup, default: float, facts: ReportedRun) -> tuple[str, str]:
    count = sum(parameter.numel() for parameter in group.parameters)
    rate = "chosen by the optimizer" if facts.chooses_own_rate else f"{default if group.lr is None else group.lr:g}"
    return (
        f"trained: {group.name}",
        f"{counted(len(group.parameters), 'tensor')}, {count:,} parameters, learning rate {rate}",
    )


# ---------------------------------------------------------------------------------------------- steps


def _steps(facts: ReportedRun, findings: Findings) -> Section:
    plan = facts.plan
    several = len(findings.datasets) > 1
    rows = tuple(_batches_row(use, findings, several) for use in findings.datasets)
    facts_of_plan = [("batches per epoch", f"{plan.batches_per_epoch}{_processes(facts)}")]
    if plan.accumulation > 1:
        batches = f"{plan.batches_per_epoch} batches / {plan.accumulation} for each step = {plan.steps_per_epoch}"
        facts_of_plan.append(("steps per epoch", batches))
    steps = f"{plan.steps} in {counted(plan.epochs, 'epoch')} of {plan.steps_per_epoch}{_last_epoch(plan)}"
    if plan.epochs == 1 and plan.steps < plan.steps_per_epoch:
        steps = f"{plan.steps} of the {plan.steps_per_epoch} of an epoch"
    facts_of_plan.append(("steps", steps))
    if facts.start_step:
        facts_of_plan.append(("goes on after step", f"{facts.start_step}, {plan.steps - facts.start_step} to go"))
    return Section(
        "Steps",
        (Facts(rows), Facts(tuple(facts_of_plan), brief=True)),
    )


def _batches_row(use: DatasetUse, findings: Findings, several: bool) -> tuple[str, str]:
    """From images to batches, for one dataset."""
    folders = [folder for folder in findings.folders if folder.dataset == use.dataset and not folder.is_reg]
    regular = [reg for reg in findings.regularisation if reg.dataset == use.dataset]
    buckets = [bucket for bucket in findings.buckets if bucket.dataset == use.dataset and bucket.samples]
    batches = sum(bucket.batches for bucket in buckets) + sum(reg.alone for reg in regular)
    batch_size = max((bucket.batch_size for bucket in buckets), default=use.batch_size)
    images = counted(sum(len(folder.images) * folder.repeats for folder in folders), "picture")
    with_regular = f" and {sum(reg.per_epoch for reg in regular)} of regularisation" if regular else ""
    place = f"{counted(len(buckets), 'bucket')}, each cut into batches of up to {batch_size}"
    return (
        f"dataset {use.dataset}" if several else "an epoch",
        f"{images} (images x repeats){with_regular} in {place}: {counted(batches, 'batch', 'batches')}",
    )


def _processes(facts: ReportedRun) -> str:
    if facts.num_processes == 1:
        return ""
    return f", each over {facts.num_processes} processes"


def _last_epoch(plan: TrainPlan) -> str:
    part = plan.steps - (plan.epochs - 1) * plan.steps_per_epoch
    return f"; the last one ends after {part}" if part < plan.steps_per_epoch else ""


# ---------------------------------------------------------------------------------------------- files


def _files(facts: ReportedRun, findings: Findings) -> Section:
    config, trained = facts.config, facts.trained
    rows = [("saved", f"{' and '.join(_due(facts))}: {facts.names.final_file()}{_sizes(facts)}")]
    if config.average.ema_decay is not None:
        average = f"{facts.names.average_of(facts.names.final_file())} and so on beside each file"
        rows.append(("average", f"{average}; previews, validation and the best file use it"))
    if config.validation.save_best:
        rows.append(("best", f"{facts.names.best_file()}, of the lowest validation loss"))
    rows += _preview_rows(config.preview) + (_validation_rows(config.validation) if findings.num_validation else [])
    blocks: list[Block] = [Facts(tuple(rows), brief=True)]
    files = facts.files[-FILES_LISTED:]
    header = ("file", "after step", "epoch", "size", "beside it", "removed after step")
    table = [
        (file.path.name, f"{file.step}", f"{file.epoch}", size(trained.file_bytes) if trained else "?",
         _beside(file, facts), "" if file.removed_at is None else f"{file.removed_at}")
        for file in files
    ]  # fmt: skip
    if len(facts.files) > len(files):
        blocks.append(Text(f"The last {len(files)} of {len(facts.files)} files:"))
    blocks.append(Table(header, tuple(table), numbers=(1, 2, 3, 5)))
    if trained:
        most = most_on_disk(facts.files, trained.file_bytes, trained.state_bytes)
        free = f"{size(facts.free_bytes)} free in {facts.names.folder}"
        blocks.append(Facts((("on disk", f"{size(most)} at most at a time; {free}"),)))
    return Section("Files", tuple(blocks))


def _due(facts: ReportedRun) -> list[str]:
    plan = facts.plan
    due = []
    if plan.save_every_n_epochs:
        due.append("every epoch" if plan.save_every_n_epochs == 1 else f"every {plan.save_every_n_epochs} epochs")
    if plan.save_every_n_steps:
        due.append(f"every {counted(plan.save_every_n_steps, 'step')}")
    return [*due, "at the end"]


def _sizes(facts: ReportedRun) -> str:
    if facts.trained is None:
        return ""
    state = f", with a state of {size(facts.trained.state_bytes)}" if facts.config.saving.save_state else ""
    each = " each" if len(_due(facts)) > 1 else ""
    return f" ({size(facts.trained.file_bytes)}{each}{state})"


def _beside(file: FileToCome, facts: ReportedRun) -> str:
    parts = [facts.names.average_of(file.path).name] if file.with_average else []
    if file.with_state:
        state = size(facts.trained.state_bytes) if facts.trained else "?"
        gone = f", removed after {file.state_removed_at}" if file.state_removed_at is not None else ""
        parts.append(f"{facts.names.state_of(file.path).name} ({state}{gone})")
    return ", ".join(parts)


def _preview_rows(options: PreviewOptions) -> list[tuple[str, str]]:
    if not options.is_on:
        return []
    due = ["at first"] if options.sample_at_first else []
    if options.every_n_epochs:
        due.append(f"every {counted(options.every_n_epochs, 'epoch')}")
    if options.every_n_steps:
        due.append(f"every {counted(options.every_n_steps, 'step')}")
    return [("previews", f"{' and '.join(due)}, of {options.sample_prompts}")]


def _validation_rows(options: ValidationOptions) -> list[tuple[str, str]]:
    due = [f"every {counted(options.validate_every_n_steps, 'step')}"] if options.validate_every_n_steps else []
    if options.every_n_epochs:
        due.append("every epoch" if options.every_n_epochs == 1 else f"every {options.every_n_epochs} epochs")
    rows = [("validated", f"before the first step, {' and '.join(due)}, at the end")]
    if options.early_stop_patience is not None:
        without = counted(options.early_stop_patience, "validation")
        rows.append(("ends early", f"after {without} without a lower loss (--early_stop_patience)"))
    return rows


# ---------------------------------------------------------------------------------------------- memory


def _memory(facts: ReportedRun) -> Section:
    memory = facts.memory
    if memory is None:
        return Section("Memory", (Text("--plan estimates the memory that a step takes."),))
    total = max(memory.total, 1)
    rows = [(part.name, Bar(size(part.size), part.size / total), part.why) for part in memory.parts]
    why = "at the largest moment of a step" if memory.is_complete else "without activations, which can't be told here"
    rows.append(("together", Bar(size(memory.total), 1.0), why))
    blocks: list[Block] = [
        Text(
            "An estimate for each process: weights, gradients and optimizer by their numbers, activations by following "
            "the shapes of one step on the largest batch; other programs on the device are not in it."
        ),
        Table(("part", "size", "how it was found"), tuple(rows), numbers=(1,)),
    ]
    more = []
    if memory.caching is not None:
        more.append(("while caching latents", f"{size(memory.caching)}, before the first step"))
    if facts.device_bytes is not None:
        more.append(("this GPU", f"has {size(facts.device_bytes)}"))
    brief = [("memory", f"about {size(memory.total)}{'' if memory.is_complete else ' without activations'}")]
    return Section("Memory", (Facts(tuple(brief), brief=True), *blocks, *([Facts(tuple(more))] if more else [])))


# ---------------------------------------------------------------------------------------------- settings


def settings_section(config: RunConfig) -> Section:
    """Every option that was set, secrets left out."""
    rows = []
    for group in config.groups():
        for option in options_of(type(group)):
            value = getattr(group, option.name)
            if value != option.default and not option.secret and option.name != "plan":
                rows.append((f"--{option.name}", "" if value is True else _typed(option, value)))
    return Section("Settings", (Table(("option", "value"), tuple(rows)),))


def _typed(option: Option, value: object) -> str:
    """A value as it is typed on a command line."""
    parts = value if isinstance(value, tuple) else (value,)
    words = [str(part.as_posix() if isinstance(part, Path) else part) for part in parts]
    if not option.many:
        words = [",".join(words)]
    return " ".join(f'"{word}"' if any(letter.isspace() for letter in word) else word for word in words)
