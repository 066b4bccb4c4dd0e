"""What a run will do, told before it starts: on the screen in short, in the log whole, as a page with pictures."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from pathlib import Path

from library.data.findings import Findings
from library.data.thumbnails import thumbnails
from library.train.data_problems import data_problems
from library.train.data_sections import data_sections
from library.train.forecast import most_on_disk
from library.train.report import Problem, Report, Section, brief_text, full_text, warnings_of
from library.train.report_page import page, shown_pictures
from library.train.resume import FileNames
from library.train.run_sections import ReportedRun, run_sections, settings_section, size, text_updates
from library.wording import counted

logger = logging.getLogger(__name__)

SECONDS_PER_IMAGE = 0.001  # that a run's start may be delayed for thumbnails ...
LEAST_SECONDS = 0.5  # ... and what is always allowed
PAGE_NAME = "report.html"


def make_report(facts: ReportedRun, findings: Findings, title: str) -> Report:
    """The document of a run."""
    name = facts.names.name or facts.names.final_file().stem
    config = facts.config
    problems = [*run_problems(facts, findings), *data_problems(findings, config.source, config.masks)]
    run, data = run_sections(facts, findings), data_sections(findings, facts.config.source)
    sections: list[Section] = [*data, *run, settings_section(facts.config)]
    return Report(
        title=f"{name}: {title}",
        subtitle=f"{time.strftime('%Y-%m-%d %H:%M')}, {facts.model}",
        tiles=tuple(_tiles(facts, findings)),
        problems=tuple(sorted(problems, key=lambda problem: not problem.is_warning)),
        sections=tuple(sections),
    )


def _tiles(facts: ReportedRun, findings: Findings) -> Iterator[tuple[str, str, str]]:
    plan = facts.plan
    if findings.images:
        yield "images", f"{len(findings.images):,}", f"in {counted(len(findings.folders), 'folder')}"
    yield "steps", f"{plan.steps:,}", f"{counted(plan.epochs, 'epoch')} of {plan.steps_per_epoch:,}"
    batch = max((bucket.batch_size for bucket in findings.buckets), default="?")
    more = f"x {plan.accumulation} for each step" if plan.accumulation > 1 else "per step"
    yield "batch", f"{batch}", more if facts.num_processes == 1 else f"{more}, {facts.num_processes} processes"
    if facts.rates:
        peak = max(course.peak for course in facts.rates)
        yield "learning rate", f"{peak:.3g}", facts.schedule
    if facts.trained is not None:
        count = sum(parameter.numel() for group in facts.trained.groups for parameter in group.parameters)
        yield "trained", _short_number(count), f"parameters, {size(facts.trained.file_bytes)} a file"
    if facts.memory is not None:
        yield "memory", f"~ {size(facts.memory.total)}", "estimated, each process"


def _short_number(count: int) -> str:
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return str(count)


def run_problems(facts: ReportedRun, findings: Findings) -> Iterator[Problem]:
    """What seems wrong with the run rather than with its data."""
    plan = facts.plan
    if plan.steps < plan.steps_per_epoch:
        seen = plan.steps / plan.steps_per_epoch
        yield Problem(
            True,
            f"the run ends after {plan.steps} of the {plan.steps_per_epoch} steps of its first epoch: "
            f"{seen:.0%} of the pictures are seen",
            "train longer (--max_train_steps, --max_train_epochs), or use fewer repeats",
        )
    schedule = facts.config.schedule
    if schedule.is_all_warmup(plan.steps) and not facts.config.optimizer.has_no_schedule:
        yield Problem(
            True,
            f"the run of {plan.steps} steps ends within its warm-up: the learning rate does not get to its full height",
            f"train longer, or shorten the warm-up (--lr_warmup_steps {schedule.warmup_steps(plan.steps)})",
        )
    if facts.config.loss.prior_loss_weight != 1 and not findings.regularisation:
        yield Problem(
            False,
            f"--prior_loss_weight {facts.config.loss.prior_loss_weight:g} has no effect: there are no regularisation "
            "pictures",
            "name their folder (--reg_data_dir), or leave the flag out",
        )
    updates = text_updates(facts)
    if plan.steps < updates < math.inf:
        yield Problem(
            False, f"the text encoder is trained for {updates:g} steps at most, and the run ends after {plan.steps}"
        )
    if facts.trained is not None:
        most = most_on_disk(facts.files, facts.trained.file_bytes, facts.trained.state_bytes)
        if most > facts.free_bytes:
            yield Problem(
                True,
                f"the files of this run take up to {size(most)}, and {size(facts.free_bytes)} are free",
                "save less often, keep fewer (--save_last_n_epochs, --save_last_n_steps), or free some space",
            )
    memory, device = facts.memory, facts.device_bytes
    if memory is not None and device is not None and memory.total > device:
        yield Problem(
            True,
            f"a step takes about {size(memory.total)}, and this GPU has {size(device)}",
            "try --gradient_checkpointing, --mixed_precision bf16, a smaller batch or --cache_latents",
        )


# ---------------------------------------------------------------------------------------------- output


def publish(report: Report, findings: Findings, names: FileNames, *, is_plan_only: bool) -> None:
    """Say the report and write it: whole into the log, as a page beside it, and for a plan also as a text."""
    text = full_text(report)
    if is_plan_only:
        plan_file = names.folder / f"{names.final_file().stem}-plan.txt"
        _write(plan_file, text)
        logger.info("%s", text)
    else:
        logger.info("%s", brief_text(report))
        for warning in warnings_of(report.problems):
            logger.warning("%s", warning)
        _write(names.log_file(), f"{text}\n", mode="a")
    shown = [findings.images[path].record for path in shown_pictures(report) if path in findings.images]
    limit = float("inf") if is_plan_only else LEAST_SECONDS + SECONDS_PER_IMAGE * len(findings.images)
    page_file = names.folder / PAGE_NAME
    _write(page_file, page(report, thumbnails(shown, limit)))
    logger.info("with pictures: %s", page_file)


def _write(path: Path, text: str, mode: str = "w") -> None:
    try:
        with path.open(mode, encoding="utf-8", errors="backslashreplace") as file:  # names of files may be any bytes
            file.write(text)
    except OSError as error:  # a report is not worth a run
        logger.warning("%s can't be written (%s)", path, error.strerror)
