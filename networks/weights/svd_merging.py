"""LoRA files merged into one of a chosen rank: their weighted sum, a module at a time, and its best approximation."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence

import torch

from library.checkpoints.safetensors_io import NonFiniteError
from library.options import OptionError
from networks.key_names import DOWN, UP
from networks.pair_rules import essential
from networks.weights.fidelity import Factors
from networks.weights.low_rank_options import SvdMergeOptions
from networks.weights.low_rank_work import Layer, Results, device_of, finite_pair, torch_dtype
from networks.weights.merge_inputs import MODELS, Source
from networks.weights.merge_options import PRECISIONS
from networks.weights.module_changes import plain_modules
from networks.weights.stored_results import StoredResults
from networks.weights.svd import sum_svd

logger = logging.getLogger(__name__)


def merge_by_svd(
    sources: Sequence[Source],
    options: SvdMergeOptions,
    store: StoredResults,
    on_done: Callable[[int], object] = lambda modules: None,
) -> Results:
    """All tensors of the merged network, in `store`; `on_done` is told after each module how many there are in all.

    Raises OptionError for networks that can't be merged, NonFiniteError for NaN.
    """
    modules = _modules(sources, ignore=options.ignore_unmatched)
    layers = {name: _layer(name, having) for name, having in modules.items()}
    device = device_of(options.device)
    calculation = torch_dtype(PRECISIONS[options.precision])
    dtype = torch_dtype(PRECISIONS[options.save_precision or options.precision])
    results = Results(store, dtype, dtype)
    for name, having in modules.items():
        terms = [_term(source, name, calculation, device) for source in having]
        svd = sum_svd([down for down, _ in terms], [up for _, up in terms])
        rank = layers[name].largest_rank(options.new_rank, options.new_conv_rank)
        stored = results.add(layers[name], svd, rank, clamp=options.clamp_quantile)
        results.compare(name, terms, stored, svd)
        on_done(len(modules))
    return results


def _modules(sources: Sequence[Source], *, ignore: bool) -> dict[str, list[Source]]:
    """The sources of each module, in the order of the files."""
    modules = plain_modules(sources, "only modules of plain LoRA can be merged here", ignore=ignore)
    if not modules:
        raise OptionError(MODELS, "nothing is left to merge", "check the files")
    return modules


def _layer(name: str, sources: Sequence[Source]) -> Layer:
    """The layer of a module; OptionError where its sources are for layers of other sizes."""
    first = sources[0].file
    layer = Layer(name, (first.shape(name, UP)[0], *first.shape(name, DOWN)[1:]))
    for source in sources[1:]:
        shape = (source.file.shape(name, UP)[0], *source.file.shape(name, DOWN)[1:])
        if essential(shape) != essential(layer.shape):
            problem = f"{name} is for {[*layer.shape]} weights in {first.path} and for {[*shape]} in {source.file.path}"
            raise OptionError(MODELS, problem, "merge what was made for the same model")
    return layer


def _term(source: Source, name: str, dtype: torch.dtype, device: torch.device) -> Factors:
    """(down, up) whose product is the source's share of the sum."""
    strength = source.ratio_of(name) * source.file.scale(name)
    if not math.isfinite(strength):
        raise NonFiniteError(f"{source.file.path}: alpha of {name} is no finite number", "take another file")
    down_RI, up_OR = finite_pair(source.file, name, dtype, device)
    return down_RI, up_OR * strength
