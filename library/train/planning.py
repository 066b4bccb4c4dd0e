"""The report of a run before it starts; with --plan that alone, from file headers, without weights."""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass
from functools import partial

import torch

from library.data.buckets import Size
from library.data.findings import Findings, find
from library.families.base import ModelBundle, ModelFamily
from library.options import OptionError
from library.randomness import seed_global_generators
from library.targets.base import ParamGroup, TrainTarget
from library.text.lengths import count_tokens
from library.text.tokens import ClipTokenizer
from library.train import fsdp_settings, placement
from library.train.beginning import Beginning, begin, param_groups
from library.train.forecast import (
    check_free_space,
    files_to_come,
    quietly,
    rate_courses,
    stand_ins,
    state_bytes_per_parameter,
    try_out,
)
from library.train.memory_estimate import MemoryEstimate, StepShape, estimate, known_parts
from library.train.optimizers import BuiltOptimizer, build_optimizer, check_optimizer
from library.train.plan_report import make_report, publish
from library.train.preflight import CheckedRun
from library.train.run_sections import ReportedRun, TrainedFacts

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trained:
    """A model with what is trained on it; `groups` is None where that needs the model's weights."""

    bundle: ModelBundle
    target: TrainTarget
    groups: tuple[ParamGroup, ...] | None


def announce(
    checked: CheckedRun,
    begun: Beginning,
    trained: Trained,
    num_processes: int,
    *,
    memory: MemoryEstimate | None = None,
    is_plan_only: bool = False,
) -> None:
    """Say and write what the run will do. Raises OptionError where its first files would not fit on the disk."""
    config, names = checked.config, checked.names
    groups = trained.groups or (ParamGroup("network", (), None),)
    with quietly():
        built = build_optimizer(config.optimizer, stand_ins(groups))
        description, per_parameter = built.description, state_bytes_per_parameter(built)
    facts_of_trained = _trained_facts(checked, trained, per_parameter)
    free = shutil.disk_usage(names.folder).free
    if facts_of_trained is not None:
        needed = facts_of_trained.file_bytes + (facts_of_trained.state_bytes if config.saving.save_state else 0)
        check_free_space(names.folder, free, needed, with_state=config.saving.save_state)
    facts = ReportedRun(
        config=config,
        names=names,
        plan=begun.plan,
        num_processes=num_processes,
        seed=begun.seed,
        start_step=begun.start_step,
        model=_model(checked, trained.bundle),
        optimizer=description,
        schedule=_schedule(checked, built, begun.plan.steps),
        chooses_own_rate=built.chooses_own_rate,
        trained=facts_of_trained,
        rates=tuple(rate_courses(config, groups, begun.plan.steps)),
        files=tuple(
            files_to_come(
                begun.plan,
                config.saving,
                names,
                start_step=begun.start_step,
                has_average=config.average.ema_decay is not None,
            )
        ),
        free_bytes=free,
        memory=memory,
        device_bytes=_device_bytes(),
    )
    findings = findings_of(checked, begun, trained.bundle, num_processes)
    title = "what would be trained" if is_plan_only else "what is trained"
    publish(make_report(facts, findings, title), findings, names, is_plan_only=is_plan_only)


def findings_of(checked: CheckedRun, begun: Beginning, bundle: ModelBundle, num_processes: int) -> Findings:
    """The data's findings, captions counted by the model's own tokenizer."""
    text, data, tokenizer = checked.config.text, begun.data, bundle.tokenizers[0]
    return find(
        data.datasets,
        data.scan,
        num_processes=num_processes,
        token_limit=75 * text.token_windows,
        count_tokens=partial(count_tokens, tokenizer, weighted=text.weighted_captions),
        counter=f"CLIP{', weighted' * text.weighted_captions}" if type(tokenizer) is ClipTokenizer else None,
        num_validation=0 if data.validation is None else data.validation.num_images,
    )


def _trained_facts(checked: CheckedRun, trained: Trained, per_parameter: float | None) -> TrainedFacts | None:
    if trained.groups is None:
        return None
    dtype = placement.SAVE_DTYPES[checked.config.saving.save_precision]
    tensors = trained.target.saved_tensors()
    parameters = trained.target.trained_module().parameters()  # frozen ones too: a state has them
    count = sum(parameter.numel() for group in trained.groups for parameter in group.parameters)
    return TrainedFacts(
        groups=trained.groups,
        notes=trained.target.notes(),
        file_bytes=sum(tensor.numel() * (dtype or tensor.dtype).itemsize for tensor in tensors),
        state_bytes=sum(parameter.numel() * parameter.element_size() for parameter in parameters)
        + round((8 if per_parameter is None else per_parameter) * count),
    )


def _model(checked: CheckedRun, bundle: ModelBundle) -> str:
    kind = {"sd1": "SD 1.x", "sd2": "SD 2.x", "sdxl": "SDXL"}.get(bundle.source.kind, bundle.source.kind)
    what = "velocity" if bundle.source.v_prediction else "noise"
    return f"{checked.config.model.pretrained_model_name_or_path} ({kind}, predicts {what})"


def _schedule(checked: CheckedRun, built: BuiltOptimizer, num_steps: int) -> str:
    """The schedule in words."""
    if built.chooses_own_rate:
        return "the optimizer's own"
    if built.is_schedule_free:
        return "none: the optimizer averages its weights instead"
    options = checked.config.schedule
    if options.lr_scheduler_type:
        return options.lr_scheduler_type
    warmup = options.warmup_steps(num_steps)
    return f"{options.name}, {warmup} steps of warm-up" if warmup else options.name


def _device_bytes() -> int | None:
    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None


# ---------------------------------------------------------------------------------------------- --plan


def plan_training(checked: CheckedRun, family: ModelFamily, target: TrainTarget) -> int:
    """What the run would do, told and written, without loading weights; returns the exit code.

    Raises the OptionErrors that the run would raise before its first step.
    """
    config = checked.config
    fsdp_settings.wanted(config, target)
    accelerator = placement.make_accelerator(
        config, autocast=target.needs_autocast, skips_parameters=target.skips_parameters
    )
    check_optimizer(config.optimizer)
    begun = begin(checked, accelerator, family)
    if not accelerator.is_main_process:
        return 0
    plan_of_parts = placement.load_plan(config, accelerator.device, target.trains_whole)
    bundle = family.outline(config.model, plan_of_parts)
    if config.training.gradient_checkpointing:
        placement.enable_gradient_checkpointing(bundle)
    seed_global_generators(begun.seed, "initialisation")
    groups = _attach(checked, family, bundle, target)
    tried = groups or (ParamGroup("network", (), None),)
    try_out(config, tried, begun.plan.steps, accelerator.device)
    built = build_optimizer(config.optimizer, stand_ins(tried))
    memory = None
    if groups is not None:
        parts = known_parts(config, bundle, groups, state_bytes_per_parameter(built), target.trained_module())
        memory = MemoryEstimate(tuple(parts), is_complete=False)
        if (shape := largest_step(checked, begun)) is not None:
            on_gpu = accelerator.device.type != "cpu"
            memory = estimate(config, family, bundle, target, parts, shape, on_gpu=on_gpu)
    announce(
        checked,
        begun,
        Trained(bundle, target, groups),
        accelerator.num_processes,
        memory=memory,
        is_plan_only=True,
    )
    return 0


def _attach(
    checked: CheckedRun, family: ModelFamily, bundle: ModelBundle, target: TrainTarget
) -> tuple[ParamGroup, ...] | None:
    """What would be trained, found on a model without weights; None where the target can't do without them."""
    config = checked.config
    try:
        target.setup(family, bundle, gradient_checkpointing=config.training.gradient_checkpointing)
        groups = param_groups(target, config.optimizer.learning_rate)
        placement.set_precision(config, bundle, target)
    except OptionError:
        raise
    except Exception as error:  # a network module of somebody else may compute with the weights
        logger.info("what is trained is not known before the model is loaded (%s)", error)
        return None
    return groups


def largest_step(checked: CheckedRun, begun: Beginning) -> StepShape | None:
    """The batch that takes the most memory: by images x pixels; None where sizes show only while training."""

    def pixels(shape: tuple[int, Size]) -> int:
        batch_size, (width, height) = shape
        return batch_size * width * height

    shapes = [
        (min(dataset.config.batch_size, count), bucket)
        for dataset in begun.data.datasets
        for bucket, count in dataset.bucket_counts
    ]
    if not shapes:
        return None
    batch_size, bucket = max(shapes, key=pixels)
    return StepShape(batch_size, bucket, checked.config.text.token_windows)
