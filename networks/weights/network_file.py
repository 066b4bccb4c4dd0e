"""Files of networks for tools: their modules by the trade's names, and each tensor when it is asked for.

A module is one layer's change: "lora_unet_..." and the parts below that name, such as "lora_down.weight" and "alpha".
Files in the form of diffusers and PEFT, and those of other programs that name a pair otherwise, have the same names
here.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from library.checkpoints.adapter_metadata import FIRST_FACTOR, adapter_alphas
from library.checkpoints.keymaps import UNetLayout, unet_paths
from library.checkpoints.network_kind import kind_by_names, network_kind
from library.checkpoints.weights import open_weights
from library.options import OptionError
from networks.key_names import COPY_AGAIN, DOWN, MAGNITUDES, MID, UP, file_key, has_two_encoders
from networks.layers import UNET_PREFIX
from networks.pair_rules import alpha_number, check_dtype, check_pair, pair_layer
from networks.weights.file_identity import OF_MODELS, identify

if TYPE_CHECKING:
    import torch

SDXL_LAYOUT = UNetLayout(attention_levels=(False, True, True), resnets=2)


class NetworkFile:
    """A network's file, opened lazily; a context manager that closes it.

    Raises OptionError, naming `where` (a flag) if given, when it can't be read or holds no modules.
    """

    def __init__(self, path: Path | str, where: str = "") -> None:
        self.path = Path(path)
        self.where = where
        self.weights = open_weights(path, where)
        self.metadata: Mapping[str, str] = self.weights.metadata
        self.modules: dict[str, dict[str, str]] = {}  # module -> part below its name -> key in the file
        self.other_keys: list[str] = []  # of no module
        shapes = self.weights.shapes
        if (identity := identify(shapes)).sort in OF_MODELS:
            raise self._error(f"is a model, no LoRA: {identity.what}", "name a LoRA")
        self.kind = network_kind(shapes)  # "sd1", "sd2", "sdxl"; "" where neither names nor sizes tell
        has_two = has_two_encoders(shapes)
        for key in shapes:
            name, dot, part = file_key(key, has_two=has_two).partition(".")
            if not dot:
                self.other_keys.append(key)
                continue
            if self.kind == "sdxl" and name.startswith(UNET_PREFIX):
                name = original_name(name)
            parts = self.modules.setdefault(name, {})
            if part in parts:
                raise self._error(f"has {part} of {name} twice: {parts[part]} and {key}", "take another file")
            parts[part] = key
        if not self.modules:
            raise self._error(f"holds no network (it has {next(iter(shapes), 'no tensor')})", "check the file")

    def __enter__(self) -> NetworkFile:
        self.weights.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.weights.__exit__(kind, error, trace)

    def shape(self, name: str, part: str) -> tuple[int, ...]:
        return self.weights.shapes[self.modules[name][part]]

    def tensor(self, name: str, part: str) -> torch.Tensor:
        """One part of a module in its own dtype: a view of the file, valid as long as the file is open."""
        return self.weights.tensor(self.modules[name][part])

    def parts(self, name: str) -> dict[str, torch.Tensor]:
        """All parts of a module in their own dtypes, by what follows its name: views of the file."""
        return {part: self.weights.tensor(key) for part, key in self.modules[name].items()}

    # ------------------------------------------------------------------ plain LoRA

    @functools.cached_property
    def pairs(self) -> list[str]:
        """The modules that are a plain LoRA: a pair of projections and nothing else that changes what they mean.

        Raises OptionError where half of a pair is missing, or the two don't fit together.
        """
        names = [name for name, parts in self.modules.items() if DOWN in parts or UP in parts or [*parts] == ["alpha"]]
        for name in names:
            self._check_pair(name)
        return [name for name in names if not {MID, *MAGNITUDES} & self.modules[name].keys()]

    def layer_shape(self, name: str) -> tuple[int, ...]:
        """Of the weight that a pair changes: [out, in], or [out, in, k, k] of a convolution of more than one pixel."""
        return pair_layer(self.shape(name, DOWN), self.shape(name, UP))

    def rank(self, name: str) -> int:
        return self.shape(name, DOWN)[0]

    def alpha(self, name: str) -> float | None:
        """None where the file has none, which stands for the rank; OptionError for NaN, infinity and no number."""
        if "alpha" in self.modules[name]:
            return alpha_number(name, self.tensor(name, "alpha"), self.path, self.where)
        match = FIRST_FACTOR.fullmatch(self.modules[name].get(DOWN, ""))
        return self._noted_alphas.get(match[1]) if match else None

    @functools.cached_property
    def _noted_alphas(self) -> dict[str, float]:
        return adapter_alphas(self.weights.shapes, self.metadata, self.path)

    def scale(self, name: str) -> float:
        """alpha / rank: the change is up @ down times this."""
        alpha = self.alpha(name)
        return 1.0 if alpha is None else alpha / self.rank(name)

    def pair(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """(down, up) in float32, of the file's shapes: [r, in] or [r, in, kh, kw], and [out, r] or [out, r, 1, 1]."""
        return self.tensor(name, DOWN).float(), self.tensor(name, UP).float()

    def _check_pair(self, name: str) -> None:
        for part in (DOWN, UP):
            if part not in self.modules[name]:
                raise self._error(f"is incomplete: {name} has no {part}", COPY_AGAIN)
        down, up = self.shape(name, DOWN), self.shape(name, UP)
        check_pair(name, down, up, self.path, self.where)
        for part in (DOWN, UP):
            check_dtype(name, part, self.weights.dtypes[self.modules[name][part]], self.path, self.where)
        if "alpha" in self.modules[name] and math.prod(self.shape(name, "alpha")) != 1:
            raise self._error(f"is damaged: alpha of {name} is no single number", COPY_AGAIN)

    def _error(self, problem: str, way_out: str) -> OptionError:
        return OptionError(self.where, f"{self.path} {problem}", way_out)


@functools.cache
def _original_prefixes() -> dict[str, str]:
    paths = unet_paths(SDXL_LAYOUT).items()
    return {theirs.replace(".", "_"): ours.replace(".", "_") for ours, theirs in paths}


def original_name(name: str) -> str:
    """A module of SDXL's U-Net by the original layout's path, whichever of the two it is named by."""
    path = name.removeprefix(f"{UNET_PREFIX}_")
    prefixes = _original_prefixes()
    words = path.split("_")
    for count in range(len(words), 0, -1):
        if found := prefixes.get("_".join(words[:count])):
            return "_".join([UNET_PREFIX, found, *words[count:]])
    return name


def kind_of_modules(file: NetworkFile) -> str:
    """The family by names alone where sizes don't tell: "sdxl" or ""."""
    return file.kind or kind_by_names(file.modules)
