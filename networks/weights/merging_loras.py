"""LoRA files merged into one, a module at a time, in one of three ways.

With down_i, up_i, alpha_i and rank r_i of source i at ratio_i, and alpha_1 of the first source that has the module:

added         s_i = ratio_i sqrt(alpha_i / alpha_1), up = sum_i |s_i| up_i, down = sum_i s_i down_i, alpha = alpha_1.
              The trade's way: one network comes out at the strength ratio^2, and several get cross terms up_i down_j.
concatenated  the same factors, ranks side by side, alpha = alpha_1: no cross terms, but a strength of
              alpha_1 / sum_i r_i instead of alpha_1 / r_1.
exact         t_i = ratio_i alpha_i / r_i, up = [sqrt|t_i| up_i], down = [sign(t_i) sqrt|t_i| down_i],
              alpha = sum_i r_i, so that the product is sum_i ratio_i (alpha_i / r_i) up_i down_i.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import torch

from library.checkpoints.safetensors_io import DTYPES, Entry, NonFiniteError, is_finite, rounded
from library.options import OptionError
from library.randomness import torch_generator
from networks.key_names import DOWN, UP
from networks.pair_rules import pair_layer
from networks.weights.fidelity import Factors, FidelityReport
from networks.weights.merge_inputs import MODELS, Source, one_or_dynamic
from networks.weights.module_changes import plain_modules

Way: TypeAlias = Literal["added", "concatenated", "exact"]
SHUFFLE_SEED = 0  # the same inputs give the same file


@dataclass(frozen=True)
class SumSettings:
    """How LoRA files are merged. Precisions as headers name them."""

    way: Way = "added"
    shuffle: bool = False
    calculation: str = "F32"  # to which inputs are rounded
    saving: str = "F32"


@dataclass
class MergedLoRA:
    """The entries of a network; `report` fills while they are produced."""

    entries: list[Entry]
    ranks: Mapping[str, int]  # by module
    alphas: Mapping[str, float]
    report: FidelityReport = field(default_factory=FidelityReport)

    @property
    def dim(self) -> str:
        """For metadata: the rank of all modules, or "Dynamic"."""
        return one_or_dynamic(self.ranks.values())

    @property
    def alpha(self) -> str:
        return one_or_dynamic(self.alphas.values())


def merged_lora(
    sources: Sequence[Source],
    settings: SumSettings,
    *,
    ignore_unmatched: bool = False,
    on_done: Callable[[str], object] = lambda name: None,
) -> MergedLoRA:
    """The entries of the merged file, each made when its turn comes; `on_done` is told the module that is complete.

    Raises OptionError for networks that can't be merged like this; nothing is computed yet.
    """
    why = "only a model (--sd_model) can take these modules, which are no plain LoRA"
    names = plain_modules(sources, why, ignore=ignore_unmatched)
    if settings.way == "exact":  # what has no effect would only add ranks
        effective = {name: [term for term in terms if term.ratio_of(name)] for name, terms in names.items()}
        names = {name: terms for name, terms in effective.items() if terms}
    if not names:
        raise OptionError(MODELS, "nothing is left to merge", "check --ratios, --lbws and the files")
    modules = {name: _Module(name, terms, settings) for name, terms in names.items()}
    merged = MergedLoRA(
        [], {name: each.rank for name, each in modules.items()}, {name: each.alpha for name, each in modules.items()}
    )
    producer = _Producer(merged.report, on_done)
    for module in modules.values():
        merged.entries += _entries(module, producer)
    return merged


# ---------------------------------------------------------------------------------------------- a module


class _Module:
    """A module of the merged network; raises OptionError where its sources do not fit together."""

    def __init__(self, name: str, sources: Sequence[Source], settings: SumSettings) -> None:
        self.name, self.sources, self.settings = name, sources, settings
        first = sources[0].file
        self.down_shape, self.up_shape = first.shape(name, DOWN), first.shape(name, UP)
        for source in sources[1:]:
            self._check_fits(first.path, source)
        ranks = [source.file.rank(name) for source in sources]
        self.rank = ranks[0] if settings.way == "added" else sum(ranks)
        self.base_alpha = _alpha(sources[0], name)
        self.alpha = float(self.rank) if settings.way == "exact" else self.base_alpha
        if settings.way != "exact":
            alphas = {str(source.file.path): _alpha(source, name) for source in sources}
            if not all(alpha / (self.base_alpha or math.nan) > 0 for alpha in alphas.values()):
                path, alpha = next((path, alpha) for path, alpha in alphas.items() if not alpha > 0)
                problem = f"alpha of {name} is {alpha:g} in {path}"
                raise OptionError(MODELS, f"{problem}, which has no square root", "use --exact")

    def _check_fits(self, first_path: object, source: Source) -> None:
        down, up, path = source.file.shape(self.name, DOWN), source.file.shape(self.name, UP), source.file.path
        if pair_layer(down, up) != pair_layer(self.down_shape, self.up_shape):
            problem = f"{self.name} is for {[*self.up_shape[:1], *self.down_shape[1:]]} weights in {first_path}"
            problem += f" and for {[*up[:1], *down[1:]]} in {path}"
            raise OptionError(MODELS, problem, "merge what was made for the same model")
        if self.settings.way == "added" and down[0] != self.down_shape[0]:
            problem = f"{self.name} has rank {self.down_shape[0]} in {first_path} and {down[0]} in {path}"
            raise OptionError(MODELS, problem, "use --exact (or --concat), which put ranks side by side")

    def factors(self) -> tuple[Factors, list[Factors]]:
        """((down, up) of the merged module in float32, the exact terms of the sum)."""
        calculation = getattr(torch, DTYPES[self.settings.calculation][1])
        terms: list[Factors] = []
        downs, ups = [], []
        for source in self.sources:
            what = f"{source.file.path}: {self.name}"
            pair = source.file.pair(self.name)
            down, up = (rounded(tensor, calculation, what, "--precision").float() for tensor in pair)
            if not (is_finite(down) and is_finite(up)):
                raise NonFiniteError(f"{what} holds NaN or infinity", "leave this network out")
            down, up = down.reshape(-1, *self.down_shape[1:]), up.reshape(len(up), -1, *self.up_shape[2:])
            strength = source.ratio_of(self.name) * source.file.scale(self.name)
            terms.append((down, up * strength))
            of_down, of_up = self._shares(source, strength)
            downs.append(down * of_down)
            ups.append(up * of_up)
        if self.settings.way == "added":
            merged = torch.stack(downs).sum(0), torch.stack(ups).sum(0)
        else:
            merged = torch.cat(downs), torch.cat(ups, dim=1)
        return self._shuffled(merged), terms

    def _shares(self, source: Source, strength: float) -> tuple[float, float]:
        """What (down, up) of a source are multiplied by; a sign goes to down."""
        if self.settings.way == "exact":  # evenly, so that neither leaves the range of half precision
            share = math.sqrt(abs(strength))
        else:
            share = abs(source.ratio_of(self.name)) * math.sqrt(_alpha(source, self.name) / self.base_alpha)
        return math.copysign(share, strength), share

    def _shuffled(self, factors: Factors) -> Factors:
        if not self.settings.shuffle:
            return factors
        generator = torch_generator(SHUFFLE_SEED, "order of merged ranks", self.name)
        order = torch.randperm(self.rank, generator=generator)
        return factors[0][order], factors[1][:, order]


def _alpha(source: Source, name: str) -> float:
    alpha = source.file.alpha(name)
    return float(source.file.rank(name)) if alpha is None else alpha


# ---------------------------------------------------------------------------------------------- entries


class _Producer:
    """Computes each module once for its two tensors, which are written one after the other."""

    def __init__(self, report: FidelityReport, on_done: Callable[[str], object]) -> None:
        self.report, self.on_done = report, on_done
        self._held: tuple[str, dict[str, torch.Tensor]] = ("", {})

    def tensor(self, module: _Module, part: str) -> torch.Tensor:
        if self._held[0] != module.name:
            self._held = (module.name, self._computed(module))
        return self._held[1][part]

    def _computed(self, module: _Module) -> dict[str, torch.Tensor]:
        (down, up), terms = module.factors()
        dtype = getattr(torch, DTYPES[module.settings.saving][1])
        stored = {DOWN: down.to(dtype), UP: up.to(dtype)}
        for part, tensor in stored.items():
            if not is_finite(tensor):
                problem = f"{part} of {module.name} is too large for {DTYPES[module.settings.saving][1]}"
                raise NonFiniteError(problem, "use --save_precision bf16 or float")
        scale = module.alpha / module.rank
        self.report.add_factors(module.name, terms, [(stored[DOWN], stored[UP].double() * scale)])
        self.on_done(module.name)
        return stored


def _entries(module: _Module, producer: _Producer) -> list[Entry]:
    def produces(part: str) -> Callable[[], torch.Tensor]:
        return lambda: producer.tensor(module, part)

    saving = module.settings.saving
    down_shape = (module.rank, *module.down_shape[1:])
    up_shape = (module.up_shape[0], module.rank, *module.up_shape[2:])
    return [
        Entry(f"{module.name}.alpha", "F32", (), lambda: torch.tensor(module.alpha)),
        Entry(f"{module.name}.{DOWN}", saving, down_shape, produces(DOWN)),
        Entry(f"{module.name}.{UP}", saving, up_shape, produces(UP)),
    ]
