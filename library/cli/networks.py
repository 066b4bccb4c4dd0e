"""Networks (LoRA and its relatives) for generation: from files on the command line into a loaded model.

Stands here because it joins two rooms that do not know each other: generation and the contract of network modules.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from library.checkpoints.network_kind import KIND_NAMES, network_kind
from library.checkpoints.safetensors_io import read_header
from library.generate.network_options import NetworkFile, NetworkOptions
from library.options import OptionError
from library.targets import options as targets
from library.wording import counted

if TYPE_CHECKING:
    from library.families.base import LoadPlan, ModelBundle
    from library.generate.networks import NetworkInUse, Networks
    from library.targets.adapter import Adapted, Models, NetworkFactory

logger = logging.getLogger(__name__)

WEIGHTS = "--network_weights"
OTHER_NETWORK = "use a network that was made for this kind of model"


def check(options: NetworkOptions) -> None:
    """Raise OptionError for modules, arguments and files that can't be used, as far as that shows without torch."""
    for file in options.files:
        arguments = tuple(f"{name}={value}" for name, value in file.arguments.items())
        targets.NetworkOptions(
            network_module=file.module, network_args=arguments, network_weights=file.path
        ).check_before_start()


def check_kind(options: NetworkOptions, model_kind: str) -> None:
    """Raise OptionError for a file that was made for another kind of model ("sd1", "sd2", "sdxl"), where keys tell."""
    for file in options.files:
        check_file_kind(file.path, model_kind, WEIGHTS)


def check_file_kind(path: str, model_kind: str, flag: str, model: str = "the model") -> None:
    """The same of one file, which `flag` named, for the model that is called `model`.

    What is no .safetensors file shows its kind only when it is loaded.
    """
    if Path(path).suffix != ".safetensors":
        return
    tensors = read_header(path, flag).tensors
    kind = network_kind({key: info.shape for key, info in tensors.items()})
    if kind and kind != model_kind:
        problem = f"{path} was made for {KIND_NAMES[kind]}, and {model} is {KIND_NAMES[model_kind]}"
        raise OptionError(flag, problem, OTHER_NETWORK)


def show_metadata(options: NetworkOptions) -> None:
    """Say what the network files hold beside their tensors (--network_show_meta)."""
    for file in options.files:
        is_safetensors = Path(file.path).suffix == ".safetensors"
        metadata = read_header(file.path, WEIGHTS).metadata if is_safetensors else {}
        lines = [f"  {key}: {value}" for key, value in sorted(metadata.items())]
        logger.info("metadata of %s:\n%s", file.path, "\n".join(lines or ["  none"]))


def check_multipliers(options: NetworkOptions, asked: Sequence[tuple[float, ...]]) -> None:
    """Say where multipliers of prompt lines (--am) have no effect."""
    most, count = max(map(len, asked), default=0), len(options.applied)
    if most > count:
        merged = f"; {counted(options.num_merged, 'network')} merged into the model can't change" * bool(
            options.num_merged
        )
        logger.warning("--am: %s for %s, the rest has no effect%s", counted(most, "multiplier"),
                       counted(count, "network"), merged)  # fmt: skip


def import_modules(options: NetworkOptions) -> list[NetworkFactory]:
    """The network modules, in order; OptionError when one can't do what generation needs, or not with its arguments."""
    if not options.files:
        return []
    from library.targets.adapter import NetworkFactory

    factories = [NetworkFactory(file.module) for file in options.files]
    for factory, file in zip(factories, options.files, strict=True):
        factory.require("create_network_from_weights")
        factory.check_arguments(file.arguments)
    return factories


def attach(
    factories: Sequence[NetworkFactory],
    options: NetworkOptions,
    bundle: ModelBundle,
    plan: LoadPlan,
    *,
    is_regional: bool = False,
) -> Networks | None:
    """Merge each network into the model, or hook it to it; returns those that are hooked, if any.

    Raises OptionError when a file does not fit the model, and for networks that can't work by regions if they have to.
    """
    if not options.files:
        return None
    from library.generate.networks import Networks
    from library.targets.adapter import Models

    models = Models(bundle.text_encoders, bundle.unet, bundle.vae)
    in_use = [
        _attached(factory, file, models, plan, wants_merge=index < options.num_merged)
        for index, (factory, file) in enumerate(zip(factories, options.files, strict=True))
    ]
    applied = [(network, file) for network, file in zip(in_use, options.files, strict=True) if network is not None]
    if is_regional:
        _check_regional([network for network, _ in applied], len(options.applied))
    used = [_in_use(network, file, pre_calc=options.network_pre_calc) for network, file in applied]
    return Networks(used, plan.device) if used else None


def plan_of(bundle: ModelBundle) -> LoadPlan:
    """The precisions and the place of a loaded model."""
    from library.families.base import LoadPlan

    unet, text, vae = (next(part.parameters()) for part in (bundle.unet, bundle.text_encoders[0], bundle.vae))
    return LoadPlan(unet.dtype, text.dtype, vae.dtype, unet.device)


def _in_use(network: Adapted, file: NetworkFile, *, pre_calc: bool) -> NetworkInUse:
    from library.generate.networks import NetworkInUse

    is_calculated = pre_calc and network.can_calculate_weights
    if pre_calc and not is_calculated:
        logger.warning("--network_pre_calc: %s can't be calculated beforehand and is applied instead", file.path)
    return NetworkInUse(network, file.multiplier, is_calculated)


def _check_regional(networks: Sequence[Adapted], expected: int) -> None:
    """Raise OptionError for networks that can't divide a picture among them."""
    for network in networks:
        network.require("set_region", "set_current_generation", "set_multiplier")
    if len(networks) > expected:
        problem = "with --mask_path every network that is not merged needs a part, and one of them can't be merged"
        raise OptionError("--network_merge", problem, "leave it out")
    if len({network.regions_by for network in networks}) > 1:
        modules = ", ".join(dict.fromkeys(network.module_name for network in networks))
        problem = f"networks of {modules} divide a picture in ways that don't fit together"
        raise OptionError("--network_module", problem, "use networks of one of these modules")


def _attached(
    factory: NetworkFactory, file: NetworkFile, models: Models, plan: LoadPlan, *, wants_merge: bool
) -> Adapted | None:
    """The network, hooked to the model; None if it is merged."""
    from library.targets.adapter import blamed_on, read_tensors

    tensors = read_tensors(file.path, WEIGHTS)
    with blamed_on(WEIGHTS):
        network, tensors = factory.create_from_weights(
            file.multiplier, file.path, models, weights_sd=tensors, for_inference=True, **file.arguments
        )
    can_merge = wants_merge and network.is_mergeable
    if wants_merge and not can_merge:
        logger.warning("--network_merge: %s can't be merged and is applied instead", file.path)
    if can_merge:
        network.merge(models, tensors, plan.unet, plan.device)
    else:
        network.apply(models, text=True, unet=True)
        with blamed_on(WEIGHTS):
            num_found = network.load(file.path, tensors or {})
        if tensors and not num_found:
            raise OptionError(WEIGHTS, f"no weight of {file.path} fits this model", OTHER_NETWORK)
        network.network.to(dtype=plan.unet, device=plan.device).eval().requires_grad_(False)
    how = "merged" if can_merge else "applied"
    logger.info("%s: %s with multiplier %g", file.path, how, file.multiplier)
    return None if can_merge else network
