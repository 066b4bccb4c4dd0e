"""Networks (LoRA and its relatives) for generation: from files on the command line into a loaded model.

Stands here because it joins two rooms that do not know each other: generation and the contract of network modules.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from library.generate.network_options import NetworkFile, NetworkOptions
from library.options import OptionError
from library.targets import options as targets

if TYPE_CHECKING:
    from library.families.base import LoadPlan, ModelBundle
    from library.targets.adapter import Models, NetworkFactory

logger = logging.getLogger(__name__)

WEIGHTS = "--network_weights"


def check(options: NetworkOptions) -> None:
    """Raise OptionError for modules, arguments and files that can't be used, as far as that shows without torch."""
    for file in options.files:
        arguments = tuple(f"{name}={value}" for name, value in file.arguments.items())
        targets.NetworkOptions(
            network_module=file.module, network_args=arguments, network_weights=file.path
        ).check_before_start()


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


def attach(factories: Sequence[NetworkFactory], options: NetworkOptions, bundle: ModelBundle, plan: LoadPlan) -> None:
    """Merge each network into the model, or hook it to it; OptionError when a file does not fit the model."""
    if not options.files:
        return
    from library.targets.adapter import Models

    models = Models(bundle.text_encoders, bundle.unet, bundle.vae)
    for factory, file in zip(factories, options.files, strict=True):
        _attach_one(factory, file, models, plan, wants_merge=options.network_merge)


def plan_of(bundle: ModelBundle) -> LoadPlan:
    """The precisions and the place of a loaded model."""
    from library.families.base import LoadPlan

    unet, text, vae = (next(part.parameters()) for part in (bundle.unet, bundle.text_encoders[0], bundle.vae))
    return LoadPlan(unet.dtype, text.dtype, vae.dtype, unet.device)


def _attach_one(
    factory: NetworkFactory, file: NetworkFile, models: Models, plan: LoadPlan, *, wants_merge: bool
) -> None:
    from library.targets.adapter import blamed_on, read_tensors

    tensors = read_tensors(file.path, WEIGHTS)
    with blamed_on(WEIGHTS):
        network, tensors = factory.create_from_weights(
            file.multiplier, file.path, models, weights_sd=tensors, for_inference=True, **file.arguments
        )
    can_merge = wants_merge and _is_mergeable(network.network)
    if wants_merge and not can_merge:
        logger.warning("--network_merge: %s can't be merged and is applied instead", file.path)
    if can_merge:
        network.merge(models, tensors, plan.unet, plan.device)
    else:
        network.apply(models, text=True, unet=True)
        with blamed_on(WEIGHTS):
            num_found = network.load(file.path, tensors or {})
        if tensors and not num_found:
            way_out = "use a network that was trained on this kind of model"
            raise OptionError(WEIGHTS, f"no weight of {file.path} fits this model", way_out)
        network.network.to(dtype=plan.unet, device=plan.device).eval().requires_grad_(False)
    how = "merged" if can_merge else "applied"
    logger.info("%s: %s with multiplier %g", file.path, how, file.multiplier)


def _is_mergeable(network: object) -> bool:
    asked = getattr(network, "is_mergeable", None)
    return bool(asked()) if callable(asked) else False
