"""Builds everything a run needs, in order, once."""

from __future__ import annotations

import logging
import random
import subprocess
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator, DistributedType

from library.checkpoints.model_spec import default_resolution
from library.data.dataset import TrainingData
from library.data.dataset_class import ForeignData
from library.diffusion.schedule import NoiseSchedule
from library.families.base import ModelBundle, ModelFamily
from library.models import vae
from library.options import OptionError
from library.randomness import seed_global_generators
from library.targets.base import TrainTarget
from library.train import fsdp_settings, logs, metadata, placement
from library.train.beginning import begin, param_groups
from library.train.config import RunConfig
from library.train.ema import WeightAverage
from library.train.final_check import FinalCheck
from library.train.finite_weights import check_finite
from library.train.forecast import try_out
from library.train.fsdp_settings import SplitSettings
from library.train.guard import NonFiniteGuard, StopRequest
from library.train.hub import HubUploader, remove_leftovers
from library.train.loop import train
from library.train.lr_schedulers import build_lr_scheduler
from library.train.optimizers import BuiltOptimizer, build_optimizer, check_optimizer
from library.train.planning import Trained, announce
from library.train.preflight import CheckedRun
from library.train.preview import Previews
from library.train.preview_prompts import preview_defaults
from library.train.resume import settings_that_matter
from library.train.run import Run
from library.train.text_caching import cache_texts
from library.train.updates import PIECE, FusedUpdates, PieceUpdates, Updates
from library.train.validation import Validation
from library.train.zero import DeepSpeedUpdates, keep_whole

if TYPE_CHECKING:
    from library.train.fsdp import SplitModel

logger = logging.getLogger(__name__)


def run_training(checked: CheckedRun, family: ModelFamily, target: TrainTarget, tracker_name: str) -> int:
    """Build the run, train, save; returns the exit code. Raises OptionError for what the user can mend."""
    started_at = time.time()
    config = checked.config
    splits = fsdp_settings.wanted(config, target)
    accelerator = placement.make_accelerator(
        config, autocast=target.needs_autocast, skips_parameters=target.skips_parameters
    )
    check_optimizer(config.optimizer)
    logs.start_trackers(accelerator, config.logging, tracker_name, logs.settings_to_show(config.groups()))
    run = build_run(checked, family, target, accelerator, splits)
    if accelerator.is_main_process:
        run.describe(_facts(run, started_at))
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
        run.close_callbacks()
        for tracker in accelerator.trackers:
            tracker.finish()  # the processes' group is left as it is, see library.cli.ending.leave


def build_run(
    checked: CheckedRun,
    family: ModelFamily,
    target: TrainTarget,
    accelerator: Accelerator,
    splits: SplitSettings | None = None,
) -> Run:
    """Everything in its order: data, model, cache, target, optimizer, schedule, state; `splits` share it out (FSDP)."""
    config = checked.config
    begun = begin(checked, accelerator, family)
    seed, data, plan, digest = begun.seed, begun.data, begun.plan, begun.digest
    plan_of_parts = placement.load_plan(config, accelerator.device, target.trains_whole)
    bundle = family.load(config.model, config.attention, plan_of_parts)
    check_finite(bundle, config.model.vae)
    if target.trains_whole:
        bundle.source = replace(bundle.source, zero_terminal_snr=config.noise.zero_terminal_snr)
    if config.training.gradient_checkpointing:
        placement.enable_gradient_checkpointing(bundle)
    seed_global_generators(seed, "initialisation")
    target.setup(family, bundle, gradient_checkpointing=config.training.gradient_checkpointing)
    groups = param_groups(target, config.optimizer.learning_rate)
    placement.set_precision(config, bundle, target)
    try_out(config, groups, plan.steps, accelerator.device)
    split = None
    if splits is not None and accelerator.num_processes > 1:
        from library.train.fsdp import split_model  # takes a second to import

        split = split_model(config, splits, bundle, target, groups, accelerator.device)
        groups = split.groups
    built = build_optimizer(config.optimizer, groups, skips_parameters=target.skips_parameters)
    lr_scheduler = build_lr_scheduler(config.schedule, built, plan.steps)
    if accelerator.is_main_process:
        whole_groups = groups if split is None else split.whole_groups()
        announce(checked, begun, Trained(bundle, target, whole_groups), accelerator.num_processes)
    keep_whole(accelerator.state.deepspeed_plugin, [p for group in groups for p in group.parameters], target)
    module = placement.step_module(config, family, bundle, target)
    model, optimizer = prepared(accelerator, module, built, is_split=split is not None)
    cache_latents(config, data, bundle, accelerator)  # last: it may take long, and everything else could have failed
    cache_texts(config, data, family, bundle, accelerator)
    run = Run(
        config=config, accelerator=accelerator, family=family, bundle=bundle, target=target, model=model,
        groups=groups, optimizer=optimizer, built=built, lr_scheduler=lr_scheduler,
        updates=make_updates(
            config, accelerator, built, optimizer, skips_parameters=target.skips_parameters, split=split
        ),
        schedule=NoiseSchedule.make(zero_terminal_snr=config.noise.zero_terminal_snr, device=accelerator.device),
        data=data, plan=plan, seed=seed, settings=settings_that_matter(config.values(), seed), digest=digest,
        names=checked.names, guard=NonFiniteGuard(config.training.max_nonfinite_steps), stop=StopRequest(),
    )  # fmt: skip
    built.wide.draw_with(seed, lambda: run.step)
    add_callbacks(run, checked)
    if checked.resume_folder is not None and checked.resume_state is not None:
        run.restore(checked.resume_folder, checked.resume_state)
        return run
    run.skip_to(begun.start_step)
    if config.saving.resume:
        logger.info("--resume latest: there is no state of this run yet; it starts after step %d", run.step)
    return run


def prepared(
    accelerator: Accelerator, module: torch.nn.Module, built: BuiltOptimizer, *, is_split: bool
) -> tuple[torch.nn.Module, Any]:
    """The module and the optimizer as accelerate wraps them; one that is split takes no part in data parallelism."""
    if not is_split:
        return accelerator.prepare(module, built.optimizer)
    model = accelerator.prepare_model(module, device_placement=False, evaluation_mode=True)
    return model, accelerator.prepare_optimizer(built.optimizer)


def make_updates(
    config: RunConfig,
    accelerator: Accelerator,
    built: BuiltOptimizer,
    optimizer: Any,
    *,
    skips_parameters: bool,
    split: SplitModel | None = None,
) -> Updates:
    """How gradients become an update: all together, or each inside the backward pass.

    `skips_parameters`: a step may leave out some of what is trained.
    """
    parameters = [parameter for group in built.optimizer.param_groups for parameter in group["params"]]
    settings: dict[str, Any] = {"max_grad_norm": config.optimizer.max_grad_norm, "wide": built.wide}
    settings["skips_parameters"] = skips_parameters
    if flag := config.memory.fused_flag:
        settings |= {"flag": flag, "num_groups": config.memory.num_fused_groups}
        return FusedUpdates(built, accelerator, optimizer, parameters, **settings)
    is_half = placement.master_dtype(config) != torch.float32
    if split is not None:
        return split.updates(built, accelerator, optimizer, parameters, in_pieces=is_half, **settings)
    is_large = is_half and sum(p.numel() for p in parameters) > PIECE
    is_deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    if is_large and not (is_deepspeed or built.needs_all_gradients or accelerator.scaler is not None):
        return PieceUpdates(built, accelerator, optimizer, parameters, **settings)
    kind = DeepSpeedUpdates if config.distributed.deepspeed else Updates
    return kind(accelerator, optimizer, parameters, **settings)


def add_callbacks(run: Run, checked: CheckedRun) -> None:
    """What happens beside the steps, in its order: the average before those that look at it."""
    run.callbacks.append(FinalCheck(run))
    decay = run.config.average.ema_decay
    if decay is not None:
        run.average = WeightAverage(run.parameters, decay)
        run.callbacks.append(run.average)
    if run.data.validation is not None:
        run.callbacks.append(Validation(run))
    if checked.previews:
        side = default_resolution(run.bundle.source.kind, run.v_prediction)
        defaults = preview_defaults(run.config, checked.datasets, usual_side=side)
        is_resumed = checked.resume_state is not None
        run.callbacks.append(Previews(run, checked.previews, defaults, is_resumed=is_resumed))
    if run.accelerator.is_main_process:
        name = run.names.final_file().stem
        remove_leftovers(run.names.folder, name)
        if run.config.hub.huggingface_repo_id:
            run.callbacks.append(HubUploader(run.config.hub, name, is_stopping=lambda: bool(run.stop)))


def cache_latents(
    config: RunConfig, data: TrainingData | ForeignData, bundle: ModelBundle, accelerator: Accelerator
) -> None:
    """Fill the latent cache if asked, or take what latents the data bring; a VAE without work leaves the device."""
    if not (config.cache.enabled or data.brings_latents):
        return
    data.cache_latents(
        partial(vae.encode, bundle.vae),
        vae.fingerprint(bundle.vae),
        config.cache,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
    )
    accelerator.wait_for_everyone()
    if data.needs_vae or config.memory.highvram:
        return
    bundle.vae.to("cpu")
    if accelerator.device.type == "cuda":
        torch.cuda.empty_cache()


def _facts(run: Run, started_at: float) -> metadata.FileFacts:
    return metadata.FileFacts(
        config=run.config,
        plan=run.plan,
        seed=run.seed,
        session_id=random.SystemRandom().randrange(2**32),
        started_at=started_at,
        optimizer=run.built.description,
        lr_scheduler=_schedule_name(run.config, run.built),
        source=run.bundle.source,
        family=run.family.describe(run.bundle),
        adapter=run.target.adapter,
        target=run.target.describe(),
        data=run.data.metadata(num_processes=run.accelerator.num_processes, accumulation=run.plan.accumulation),
        resolution=_trained_size(run),
        thumbnail=metadata.data_url(run.config.metadata.metadata_thumbnail),
        version=program_version(),
    )


def _trained_size(run: Run) -> tuple[int, int] | None:
    """The resolution of the dataset with most samples."""
    largest = max(run.data.datasets, key=lambda dataset: dataset.num_train, default=None)
    return run.config.bucket.resolution if largest is None else largest.config.bucket.resolution


def _schedule_name(config: RunConfig, built: BuiltOptimizer) -> str:
    """As metadata call it."""
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
