"""LoRA at other ranks: each module's product decomposed, and its strongest directions kept."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from library.checkpoints.safetensors_io import NonFiniteError, is_finite
from library.options import OptionError
from library.wording import counted
from networks.key_names import DOWN, UP
from networks.weights.low_rank_options import ResizeOptions
from networks.weights.low_rank_work import Layer, Results, device_of, finite_pair, torch_dtype
from networks.weights.merge_options import PRECISIONS
from networks.weights.network_file import NetworkFile
from networks.weights.stored_results import StoredResults
from networks.weights.svd import Svd, chosen_rank, product_svd

logger = logging.getLogger(__name__)
SHOWN = 3  # names in a message


@dataclass
class Resized:
    """A resized network."""

    results: Results
    old_ranks: dict[str, int] = field(default_factory=dict)  # of linear layers' modules and of convolutions', by module
    retained: list[float] = field(default_factory=list)  # of each module: sqrt(sum of S^2 kept / sum of all)


def resize(
    file: NetworkFile, options: ResizeOptions, store: StoredResults, on_done: Callable[[], object] = lambda: None
) -> Resized:
    """All tensors of the resized network, in `store`.

    Raises OptionError for modules that are no plain LoRA unless they may be copied, NonFiniteError for NaN.
    """
    plain = set(file.pairs)
    _report_others(file, [name for name in file.modules if name not in plain], ignore=options.ignore_unmatched)
    if not plain:
        raise OptionError("--model", f"{file.path} holds no plain LoRA", "there is nothing to resize")
    device = device_of(options.device)
    dtype = torch_dtype(PRECISIONS[options.save_precision or "float"])
    resized = Resized(Results(store, dtype, dtype))
    smaller = 0
    for name in file.modules:
        if name in plain:
            smaller += _resize_module(file, name, options, resized, device)
            _copy(file, name, resized, without=(DOWN, UP, "alpha"))
        else:
            _copy(file, name, resized)
        on_done()
    for key in file.other_keys:
        store.add(key, _cast(file.weights.tensor(key), dtype))
    if smaller:
        logger.info("%s no larger than the rank asked for; there the rank is all that they can have",
                    counted(smaller, "layer is", "layers are"))  # fmt: skip
    return resized


def _report_others(file: NetworkFile, names: list[str], *, ignore: bool) -> None:
    if not names:
        return
    listed = ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
    problem = f"{file.path}: {counted(len(names), 'module is', 'modules are')} no plain LoRA ({listed})"
    if not ignore:
        raise OptionError("--model", problem, "copy them as they are with --ignore_unmatched")
    logger.warning("%s; copied as they are", problem)


def _resize_module(
    file: NetworkFile, name: str, options: ResizeOptions, resized: Resized, device: torch.device
) -> bool:
    """Whether the layer is too small for the rank asked for."""
    down_RI, up_OR = finite_pair(file, name, torch.float32, device)
    scale = file.scale(name)
    layer = Layer(name, (len(up_OR), *file.shape(name, DOWN)[1:]))
    cap = options.new_conv_rank if layer.is_conv and options.new_conv_rank else options.new_rank
    sides = min(len(up_OR), down_RI.shape[1])
    svd = product_svd(down_RI, up_OR, keep=min(cap, sides))
    values = torch.cat([svd.values_K, svd.values_K.new_zeros(sides - len(svd.values_K))])  # of the whole product
    rank = chosen_rank(values, options.dynamic_method, options.dynamic_param or 0.0, cap, exactly=options.exact_rank)
    stored = resized.results.add(layer, svd, rank, alpha=scale * rank)
    resized.results.compare(name, [(down_RI, up_OR * scale)], stored, svd)
    resized.old_ranks[name] = file.rank(name)
    _note_retained(name, svd, values, rank, resized, verbose=options.verbose)
    return cap > sides


def _note_retained(
    name: str, svd: Svd, values: torch.Tensor, rank: int, resized: Resized, *, verbose: bool
) -> None:  # fmt: skip
    kept = values[:rank]
    norm = math.sqrt(float(kept.square().sum()) / svd.energy) if svd.energy else 1.0
    resized.retained.append(norm)
    if verbose:
        total, last = float(values.sum()), float(kept[-1])
        share = float(kept.sum()) / total if total else 1.0
        ratio = f"{float(values[0]) / last:.1f}" if last else "inf"
        logger.info("%-75s | sum(S) retained: %.1f%%, fro retained: %.1f%%, max(S) ratio: %s, rank: %d",
                    name, 100 * share, 100 * norm, ratio, rank)  # fmt: skip


def _copy(file: NetworkFile, name: str, resized: Resized, without: tuple[str, ...] = ()) -> None:
    for part in file.modules[name]:
        if part not in without:
            tensor = _cast(file.tensor(name, part), resized.results.dtype)
            if not is_finite(tensor):
                raise NonFiniteError(f"{file.path}: {part} of {name} holds NaN or infinity", "take another file")
            resized.results.store.add(f"{name}.{part}", tensor)


def _cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor
