"""Options of control by guide images: ControlNet and ControlNet-LLLite."""

from __future__ import annotations

import re
from dataclasses import dataclass

from library.generate.options import check_factor
from library.options import OptionError, opt, require
from library.wording import counted

GUIDE = "--guide_image_path"
MODELS = "--control_net_models"
LLLITE = "--control_net_lllite_models"
PREPROCESSORS = "--control_net_preps"
CANNY = re.compile(r"canny(?:_(\d+))?(?:_(\d+))?")
CANNY_THRESHOLDS = (63, 191)  # of the gradient: weak edges, which must touch strong ones; strong edges
MODES = ("alternate", "sum")


@dataclass(frozen=True)
class Preprocessor:
    """What is made of a guide image before a network sees it."""

    name: str = "none"
    thresholds: tuple[int, int] | None = None  # of Canny's edges; None: the picture itself

    @classmethod
    def parse(cls, text: str) -> Preprocessor:
        """ "none", "canny", "canny_63" or "canny_63_191"; raises OptionError for anything else."""
        if text == "none":
            return cls()
        match = CANNY.fullmatch(text)
        if match is None:
            problem = f"{text!r} is no preprocessor"
            raise OptionError(PREPROCESSORS, problem, "use none, canny or canny_63_191 (with other thresholds)")
        weak, strong = (
            default if given is None else int(given)
            for given, default in zip(match.groups(), CANNY_THRESHOLDS, strict=True)
        )
        return cls(text, (weak, strong))


@dataclass(frozen=True)
class ControlFile:
    """One network that sees guide images."""

    path: str
    flag: str  # that named it
    preprocessor: Preprocessor
    weight: float
    ratio: float  # the share of the steps in which it takes part


@dataclass(frozen=True)
class ControlOptions:
    """Control by guide images: ControlNet and ControlNet-LLLite. Values belong to the networks in their order."""

    guide_image_path: tuple[str, ...] | None = opt(
        help="guide images, or folders of them: one for each network of the first picture, then of the second ..."
    )
    control_net_models: tuple[str, ...] | None = opt(help="ControlNets: original or Diffusers files, Diffusers folders")
    control_net_lllite_models: tuple[str, ...] | None = opt(help="ControlNet-LLLite files (SDXL)")
    control_net_preps: tuple[str, ...] | None = opt(
        help="what is made of each network's guide image: none, canny, or canny_63_191 with other thresholds"
    )
    control_net_weights: tuple[float, ...] | None = opt(help="strength of each network; 1.0 where missing")
    control_net_multipliers: tuple[float, ...] | None = opt(help="another name of --control_net_weights")
    control_net_ratios: tuple[float, ...] | None = opt(
        help="share of the steps, from the first one on, that each network takes part in; 1.0 where missing"
    )
    control_net_mode: str = opt(
        "alternate", choices=MODES, help="several ControlNets: one after the other from step to step, or their sum"
    )

    def __post_init__(self) -> None:
        count = len(self.control_net_models or ()) + len(self.control_net_lllite_models or ())
        require(
            not (self.control_net_weights and self.control_net_multipliers),
            "--control_net_multipliers",
            "is the same as --control_net_weights",
            "give one of them",
        )
        for name in ("preps", "weights", "multipliers", "ratios"):
            given = len(getattr(self, f"control_net_{name}") or ())
            problem = f"{counted(given, 'value')} for {counted(count, 'network')}"
            require(given <= count, f"--control_net_{name}", problem, "give at most one per network, in their order")
        for name in ("weights", "multipliers"):
            for weight in getattr(self, f"control_net_{name}") or ():
                check_factor(f"--control_net_{name}", weight, "1")
        for ratio in self.control_net_ratios or ():
            require(0 <= ratio <= 1, "--control_net_ratios", f"{ratio:g} is no share of the steps", "use 0 to 1")
        require(count == 0 or bool(self.guide_image_path), GUIDE, "the ControlNets have no guide image", "name one")
        self.files  # noqa: B018  checks the names of preprocessors

    @property
    def files(self) -> tuple[ControlFile, ...]:
        """The networks: ControlNets first, then ControlNet-LLLites."""
        named = [(path, MODELS) for path in self.control_net_models or ()]
        named += [(path, LLLITE) for path in self.control_net_lllite_models or ()]
        preprocessors = (self.control_net_preps or ()) + ("none",) * len(named)
        weights = (self.control_net_weights or self.control_net_multipliers or ()) + (1.0,) * len(named)
        ratios = (self.control_net_ratios or ()) + (1.0,) * len(named)
        rows = zip(named, preprocessors, weights, ratios, strict=False)
        return tuple(
            ControlFile(path, flag, Preprocessor.parse(text), weight, ratio)
            for (path, flag), text, weight, ratio in rows
        )
