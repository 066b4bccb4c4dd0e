"""Builds everything a run needs, in order, once."""

from __future__ import annotations

import logging
import random
import shutil
import subprocess
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from library.checkpoints.safetensors_io import legacy_model_hash
from library.data.dataset import TrainingData
from library.diffusion.loss import timestep_weightings
from library.diffusion.schedule import NoiseSchedule
from library.families.base import ModelBundle, ModelFamily
from library.models import vae
from library.options import OptionError
from library.randomness import seed_global_generators
from library.targets.base import TrainTarget
from library.train import logs, metadata, placement, report
from library.train.config import RunConfig
from library.train.guard import NonFiniteGuard, StopRequest
from library.train.loop import train
from library.train.lr_schedulers import build_lr_scheduler
from library.train.optimizers import BuiltOptimizer, build_optimizer, check_optimizer
from library.train.plan import TrainPlan
from library.train.preflight import CheckedRun
from library.train.resume import RunState, check_same_data, settings_that_matter
from library.train.run import Run

logger = logging.getLogger(__name__)


def run_training(checked: CheckedRun, family: ModelFamily, target: TrainTarget, tracker_name: str) -> int:
    """Build the run, train, save; returns the exit code. Raises OptionError for what the user can mend."""
    started_at = time.time()
    config = checked.config
    accelerator = placement.make_accelerator(config, autocast=target.needs_autocast)
    check_optimizer(config.optimizer)
    logs.start_trackers(accelerator, config.logging, tracker_name)
    run = build_run(checked, family, target, accelerator)
    if accelerator.is_main_process:
        run.describe(_facts(run, started_at))
        print_plan(run)
    run.open_log()
    try:
        return train(run)
    except torch.OutOfMemoryError:
        raise OptionError(
            "--train_batch_size",
            f"{config.loader.train_batch_size} at this size does not fit into the GPU's memory",
            "try --gradient_checkpointing, --mixed_precision bf16, a smaller batch or --cache_latents",
        ) from None
    finally:
        run.log.close()
        accelerator.end_training()


def build_run(checked: CheckedRun, family: ModelFamily, target: TrainTarget, accelerator: Accelerator) -> Run:
    """Everything in its order: data, model, cache, target, optimizer, schedule, state."""
    config = checked.config
    seed = _seed(checked, accelerator)
    data = TrainingData.build(checked.datasets, seed=seed, on_bad_image=config.source.on_bad_image)
    for line in data.report_lines():
        logger.info(line)
    plan = TrainPlan.make(config.training, config.saving, data.batches_per_epoch(accelerator.num_processes))
    digest = {"batches per epoch": plan.batches_per_epoch, "training data": data.digest()} | file_digests(config)
    if checked.resume_folder is not None and checked.resume_state is not None:
        check_same_data(checked.resume_folder, checked.resume_state, digest)

    bundle = family.load(config.model, config.attention, placement.load_plan(config, accelerator.device))
    if config.training.gradient_checkpointing:
        placement.enable_gradient_checkpointing(bundle)
    seed_global_generators(seed, "initialisation")
    target.setup(family, bundle, gradient_checkpointing=config.training.gradient_checkpointing)
    groups = target.param_groups(config.optimizer.learning_rate)
    if not any(group.parameters for group in groups):
        raise OptionError(
            "", "nothing is left to train with these settings", "look at learning rates and at what is trained"
        )
    built = build_optimizer(config.optimizer, groups)
    lr_scheduler = build_lr_scheduler(config.schedule, built, plan.steps)
    step_module = placement.StepModule(family, bundle, target, config.text)
    model, optimizer = accelerator.prepare(step_module, built.optimizer)
    cache_latents(config, data, bundle, accelerator)  # last: it may take long, and everything else could have failed
    run = Run(
        config=config, accelerator=accelerator, family=family, bundle=bundle, target=target, model=model,
        groups=groups, optimizer=optimizer, built=built, lr_scheduler=lr_scheduler,
        schedule=NoiseSchedule.make(zero_terminal_snr=config.noise.zero_terminal_snr, device=accelerator.device),
        weightings=timestep_weightings(config.loss, v_prediction=bundle.source.v_prediction),
        data=data, plan=plan, seed=seed, settings=settings_that_matter(config.values(), seed), digest=digest,
        names=checked.names, guard=NonFiniteGuard(config.training.max_nonfinite_steps), stop=StopRequest(),
    )  # fmt: skip
    if checked.resume_folder is not None and checked.resume_state is not None:
        check_length(plan, checked.resume_state)
        run.restore(checked.resume_folder, checked.resume_state)
    elif config.saving.resume:
        logger.info("--resume latest: there is no state of this run yet; it starts at step 0")
    return run


def file_digests(config: RunConfig) -> dict[str, str | None]:
    """What a resumed run must find again of its model files: size and a part's hash, or the name of what is no file."""
    digests: dict[str, str | None] = {}
    names = {"base model": [config.model.pretrained_model_name_or_path], "VAE": [config.model.vae]}
    names["base weights"] = list(getattr(config.target, "base_weights", None) or ())
    for what, files in names.items():
        parts = []
        for name in files:
            path = Path(name) if name else None
            is_file = path is not None and path.is_file()
            parts.append(f"{path.stat().st_size} bytes, {legacy_model_hash(path)}" if path and is_file else str(name))
        digests[what] = "; ".join(parts)
    return digests


def check_length(plan: TrainPlan, state: RunState) -> None:
    """Raise OptionError for a run that should end before the state it resumes."""
    if state.step > plan.steps:
        raise OptionError(
            "--resume", f"the state is from step {state.step}, beyond this run's {plan.steps}", "train longer, or anew"
        )
    if state.step == plan.steps:
        logger.info("this run is complete: nothing is left to train")


def cache_latents(config: RunConfig, data: TrainingData, bundle: ModelBundle, accelerator: Accelerator) -> None:
    """Fill the latent cache if asked; the VAE then leaves the device."""
    if not (config.cache.cache_latents or config.cache.cache_latents_to_disk):
        return
    data.cache_latents(
        partial(vae.encode, bundle.vae),
        vae.fingerprint(bundle.vae),
        config.cache,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
    )
    accelerator.wait_for_everyone()
    bundle.vae.to("cpu")
    if accelerator.device.type == "cuda":
        torch.cuda.empty_cache()


def check_free_space(folder: Path, needed_bytes: int) -> None:
    """Raise OptionError where the first files of the run would not fit."""
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise OptionError(
            "--output_dir",
            f"{folder} has {free / 2**20:.0f} MiB free; one file with its state takes {needed_bytes / 2**20:.0f} MiB",
            "free some space or choose another folder",
        )


def _seed(checked: CheckedRun, accelerator: Accelerator) -> int:
    """The seed given, or the resumed run's, or one drawn by the main process for all."""
    if checked.config.training.seed is not None:
        return checked.config.training.seed
    if checked.resume_state is not None:
        return int(checked.resume_state.settings["seed"])
    drawn = random.SystemRandom().randrange(2**31) if accelerator.is_main_process else 0
    seed = int(placement.reduced(accelerator, torch.tensor([drawn], device=accelerator.device), "sum"))
    logger.info("--seed not given: %d was drawn", seed)
    return seed


def _facts(run: Run, started_at: float) -> metadata.RunFacts:
    return metadata.RunFacts(
        config=run.config,
        plan=run.plan,
        seed=run.seed,
        session_id=random.SystemRandom().randrange(2**32),
        started_at=started_at,
        optimizer=run.built.description,
        lr_scheduler=_schedule_name(run.config, run.built),
        family=run.family.describe(run.bundle),
        target=run.target.describe(),
        data=run.data.metadata(num_processes=run.accelerator.num_processes, accumulation=run.plan.accumulation),
        version=program_version(),
    )


def _schedule_name(config: RunConfig, built: BuiltOptimizer) -> str:
    if built.chooses_own_rate:
        return f"adafactor:{config.optimizer.learning_rate}"
    return config.schedule.lr_scheduler_type or config.schedule.lr_scheduler


def program_version() -> str:
    """The git commit this program was started from, or "(unknown)"."""
    root = Path(__file__).resolve().parents[2]
    try:
        command = ["git", "-C", str(root), "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "(unknown)"


def print_plan(run: Run) -> None:
    trained_bytes = sum(parameter.numel() * 4 for parameter in run.parameters)
    dtype = placement.SAVE_DTYPES[run.config.saving.save_precision]
    file_bytes = trained_bytes * (dtype.itemsize if dtype else 4) // 4
    check_free_space(run.names.folder, file_bytes + (3 * trained_bytes if run.config.saving.save_state else 0))
    rows: list[tuple[str, Any]] = [
        *report.trained_rows(run.groups, run.config.optimizer.learning_rate, run.built.chooses_own_rate),
        ("optimizer", run.built.description),
        ("schedule", _schedule_name(run.config, run.built)),
        *report.plan_rows(run.data, run.plan, run.accelerator.num_processes, run.start_step),
        *report.saving_rows(run.config, run.plan, run.names.final_file(), file_bytes),
        ("seed", str(run.seed)),
    ]  # fmt: skip
    logger.info("This run:\n%s", report.table(rows))
