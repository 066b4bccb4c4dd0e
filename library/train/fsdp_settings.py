"""What accelerate's FSDP configuration asks for, and what of it applies here.

`accelerate launch` hands its configuration to the processes in environment variables. Of FSDP (Zhao et al. 2023) it
knows two versions, with settings of their own; weights are split here by the second one's way whichever is named. The
splitting is the run's own, not accelerate's, so that optimizer, average, states and files know of it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from library.options import OptionError, require
from library.train.config import RunConfig

logger = logging.getLogger(__name__)

SWITCH = "ACCELERATE_USE_FSDP"
LAUNCH = "accelerate launch --use_fsdp"
UNITS = frozenset({"ResnetBlock2D", "BasicTransformerBlock", "CLIPEncoderLayer"})  # what is whole at a time
STRATEGIES = ("FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD", "HYBRID_SHARD", "HYBRID_SHARD_ZERO2")  # numbered from 1


@dataclass(frozen=True)
class SplitSettings:
    """How trained weights are split over processes."""

    frees_after_forward: bool = (
        True  # a unit's whole weights are there only while it is computed, else until its backward
    )
    units: frozenset[str] = UNITS  # names of the classes of modules whose weights are gathered together
    has_own_units: bool = False  # the configuration names them


def split_settings(environment: Mapping[str, str]) -> SplitSettings | None:
    """What the environment asks for; None where that is not FSDP. Raises OptionError for what is not done here."""
    if environment.get(SWITCH, "false").lower() != "true":
        return None
    if _is_true(environment, "OFFLOAD_PARAMS"):
        way_out = "leave it out, or use --deepspeed with --offload_optimizer_device cpu"
        raise OptionError("--fsdp_offload_params true", "weights are not kept in the CPU's memory with FSDP", way_out)
    if environment.get("FSDP_IGNORED_MODULES"):
        raise OptionError("FSDP_IGNORED_MODULES", "parts of the model can't be left out of FSDP", "leave it out")
    names = environment.get("FSDP_TRANSFORMER_CLS_TO_WRAP", "")
    units = frozenset(name.strip() for name in names.split(",") if name.strip())
    return SplitSettings(_frees_after_forward(environment), units or UNITS, bool(units))


def _frees_after_forward(environment: Mapping[str, str]) -> bool:
    if environment.get("FSDP_VERSION", "1") == "2":
        return environment.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() != "false"
    given = environment.get("FSDP_SHARDING_STRATEGY", "1").upper()
    strategy = STRATEGIES[int(given) - 1] if given in ("1", "2", "3", "4", "5") else given
    if strategy not in ("FULL_SHARD", "SHARD_GRAD_OP"):
        way_out = "use FULL_SHARD or SHARD_GRAD_OP, or start plain processes (accelerate launch --multi_gpu)"
        raise OptionError("--fsdp_sharding_strategy", f"{given} is not one of those that are done here", way_out)
    return strategy == "FULL_SHARD"


def _is_true(environment: Mapping[str, str], name: str) -> bool:
    return environment.get(f"FSDP_{name}", "false").lower() == "true"


def wanted(config: RunConfig, target: Any) -> SplitSettings | None:
    """What is to be split in this run, if anything. To be asked before there is an Accelerator.

    Raises OptionError where something does not go together.
    """
    settings = split_settings(os.environ)
    if settings is None:
        return None
    if not target.trains_whole:
        logger.warning("FSDP has no effect: a network is not split, each process trains it with plain data parallelism")
        return None
    if os.environ.get("WORLD_SIZE", "1") == "1":
        logger.warning("FSDP has no effect: there is one process")
        return None
    check_split(config)
    for note in notes_on(os.environ):
        logger.warning(note)
    return settings


def take_over() -> None:
    """Switch accelerate's own FSDP off in this process; to be called before there is an Accelerator."""
    if SWITCH in os.environ:
        os.environ[SWITCH] = "false"


def check_split(config: RunConfig) -> None:
    """Raise OptionError for what does not go together with weights that are split."""
    distributed, memory = config.distributed, config.memory
    for name, is_given, why, way_out in (
        ("deepspeed", distributed.deepspeed, "which splits the same things", "use one of them"),
        ("ddp_static_graph", distributed.ddp_static_graph, "which takes the place of data parallelism", ""),
        ("ddp_gradient_as_bucket_view", distributed.ddp_gradient_as_bucket_view, "which has no such buffers", ""),
        ("torch_compile", memory.torch_compile, "which gathers weights between the U-Net's parts", ""),
        ("cpu_offload_checkpointing", memory.cpu_offload_checkpointing, "whose weights would be moved too", ""),
        (memory.fused_flag[2:], bool(memory.fused_flag), "with which no process has a whole gradient", ""),
    ):
        require(not is_given, f"--{name}", f"does not go with FSDP, {why}", way_out or "leave it out")
    is_fp16 = config.training.mixed_precision == "fp16"
    require(not is_fp16, "--mixed_precision", "fp16 scales gradients, which FSDP does not do here", "use bf16")


def notes_on(environment: Mapping[str, str]) -> list[str]:
    """A sentence for each setting that would matter and has no effect."""
    notes = []
    if _is_true(environment, "ACTIVATION_CHECKPOINTING"):
        notes.append("--fsdp_activation_checkpointing has no effect: that is --gradient_checkpointing")
    if environment.get("FSDP_AUTO_WRAP_POLICY", "").upper() == "SIZE_BASED_WRAP":
        notes.append("--fsdp_auto_wrap_policy SIZE_BASED_WRAP has no effect: weights are gathered block by block")
    return notes
