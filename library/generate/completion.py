"""What a request says beyond its prompt's picture: where it starts, in which stages and resolutions it is drawn."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from pathlib import Path

from library.diffusion.samplers import check_sigmas, check_steps
from library.generate.config import GenerationConfig
from library.generate.guide_images import GuideImages
from library.generate.network_options import NetworkOptions
from library.generate.options import LEAST_SIZE
from library.generate.prompt_line import PromptLine
from library.generate.region_map import in_regions, region_map
from library.generate.request import GenerationRequest
from library.generate.resolution_options import DeepShrinkOptions, GradualLatentOptions, overridden
from library.generate.size_options import SizeOptions
from library.generate.sources import SIZE_STEP, Sources
from library.generate.start_options import DEFAULT_STRENGTH, StartOptions, check_strength
from library.options import require

logger = logging.getLogger(__name__)

BLOCKS = {"sd": 3, "sdxl": 8}  # largest depth of Deep Shrink by family
GRADUAL_SAMPLERS = ("euler_a", "k_euler_a")


@dataclass(frozen=True)
class Completion:
    """library.generate.request.Completion from the flags, for prompts of any source."""

    config: GenerationConfig
    sources: Sources
    guides: GuideImages
    family: str  # "sd" | "sdxl"
    region_map: Path | None = None
    said: set[str] = field(default_factory=set)  # warnings: once for each line, not for each of its pictures

    @classmethod
    def of(cls, config: GenerationConfig, family: str) -> Completion:
        """Raises OptionError for files that are not there; their contents are looked at when it is their turn."""
        start, picture = config.start, config.picture
        given_size = (picture.W, picture.H) if picture.W is not None and picture.H is not None else None
        sources = Sources.of(start.image_path, inpainting_masks(start, config.networks), given_size)
        return cls(config, sources, GuideImages.of(config.control), family, region_map(config))

    def __call__(self, request: GenerationRequest, line: PromptLine, number: int) -> GenerationRequest:
        """The request of a line, whose number in its list says whose turn it is; OptionError names the line."""
        if self.region_map is not None:
            request = in_regions(request, self.region_map, self.config)
        request = replace(
            self._started(request, line, number),
            deep_shrink=self._deep_shrink(line),
            gradual_latent=self._gradual_latent(line, request.sampler),
            start_noise=self.config.start_noise,
            zero_terminal_snr=self.config.schedule.zero_terminal_snr,
            negative_scale=self._negative_scale(line),
            weighting=line.weighting or self.config.guidance.emb_normalize_mode,
            sizes=self._sizes(line),
            sigmas=self._sigmas(line, request.sampler),
            guide_images=self.guides.of_picture(number),
        )
        self.config.critics.check_request(request, line.where)
        is_fading = request.gradual_latent != GradualLatentOptions()
        problem = "gradual latent and a mask can't go together: what stays would have to be enlarged"
        require(not (request.mask and is_fading), line.where, problem, "leave one of them out")
        is_shrinking = request.deep_shrink.ds_depth_1 is not None
        problem = "Deep Shrink and a ControlNet can't go together: it sees the picture in its full size"
        require(not (is_shrinking and self.config.control.control_net_models), line.where, problem, "leave one out")
        return request if self.config.highres.highres_fix_scale is None else self._in_two_stages(request, line)

    def _started(self, request: GenerationRequest, line: PromptLine, number: int) -> GenerationRequest:
        """The request with the picture that it starts from, and of its size."""
        if not self.sources.images:
            if self.config.highres.highres_fix_scale is None:
                if line.strength is not None:
                    self._say(f"{line.where}: --t has no effect: the picture starts from noise alone")
                elif self.config.start.strength is not None:
                    self._say("--strength has no effect: pictures start from noise alone, without --image_path")
            return request
        width, height = self.sources.size(number)
        if (line.width or width, line.height or height) != (width, height):
            self._say(f"{line.where}: --w and --h have no effect: a picture has the size of the one that it starts "
                      "from, or that of --W and --H")  # fmt: skip
        if (width, height) != self.sources.asked_size(number):
            self._say(f"{self.sources.image(number)} becomes a picture of {width}x{height}: what starts from a picture "
                      f"has a size in multiples of {SIZE_STEP}")  # fmt: skip
        request = replace(request, width=width, height=height, image=self.sources.image(number))
        return with_strength(replace(request, mask=self.sources.mask(number)), self._strength(line), line.where)

    def _strength(self, line: PromptLine) -> float:
        check_strength(f"{line.where}: --t", line.strength)
        for strength in (line.strength, self.config.start.strength):
            if strength is not None:
                return strength
        return DEFAULT_STRENGTH

    def _deep_shrink(self, line: PromptLine) -> DeepShrinkOptions:
        options = overridden(self.config.deep_shrink, line)
        for depth in (options.ds_depth_1, options.ds_depth_2):
            most = BLOCKS[self.family]
            require(depth is None or depth <= most, line.where, f"this model has no block {depth}", f"use 0 to {most}")
        return options

    def _gradual_latent(self, line: PromptLine, sampler: str) -> GradualLatentOptions:
        options = overridden(self.config.gradual_latent, line)
        if options.gradual_latent_timesteps is None or sampler in GRADUAL_SAMPLERS:
            return options
        self._say(f"{line.where}: gradual latent has no effect with {sampler}: euler_a alone can do it")
        return GradualLatentOptions()

    def _negative_scale(self, line: PromptLine) -> float | None:
        scale = self.config.guidance.negative_scale if line.negative_scale is None else line.negative_scale
        return scale if isinstance(scale, (int, float)) else None  # a line may say "none"

    def _sizes(self, line: PromptLine) -> SizeOptions:
        sizes = self.config.sizes.of_line(line)
        if sizes == SizeOptions() or self.family == "sdxl":
            return sizes
        self._say(f"{line.where}: --ow, --oh, --nw, --nh, --ct and --cl have no effect: this model knows no sizes")
        return SizeOptions()

    def _sigmas(self, line: PromptLine, sampler: str) -> str:
        if line.sigmas is not None:
            return line.sigmas
        sigmas = self.config.schedule.sigmas
        check_sigmas("--sigmas", sampler, sigmas)
        return sigmas

    def _say(self, sentence: str) -> None:
        if sentence not in self.said:
            self.said.add(sentence)
            logger.warning("%s", sentence)

    def _in_two_stages(self, request: GenerationRequest, line: PromptLine) -> GenerationRequest:
        """Highres fix: the first stage is a request of its own, smaller, and all that an image and a mask mean is its.

        Options that hold for the size of a picture have to be scaled with it here.
        """
        options = self.config.highres
        scale, sampler = options.highres_fix_scale or 1.0, request.sampler
        check_steps("--highres_fix_steps", sampler, options.highres_fix_steps)
        width, height = (
            int(side * scale + 0.5) // SIZE_STEP * SIZE_STEP for side in (request.width, request.height)
        )  # as the trade's scripts round them
        problem = f"{scale} of {request.width}x{request.height} is a first stage of {width}x{height}"
        way_out = f"{LEAST_SIZE} pixels are the least, in multiples of {SIZE_STEP}"
        require(min(width, height) >= LEAST_SIZE, "--highres_fix_scale", problem, way_out)
        first = replace(
            request, width=width, height=height, steps=options.highres_fix_steps, sizes=request.sizes.scaled(scale)
        )
        if first.image:
            strength = options.highres_fix_strength
            first = with_strength(first, request.strength if strength is None else strength, line.where)
        second = replace(
            request, image="", mask="", first_stage=first, upscaler=options.upscaler,
            start_noise=GenerationRequest.start_noise, is_controlled=not options.highres_fix_disable_control_net,
        )  # fmt: skip
        return with_strength(second, self._strength(line), line.where)


def inpainting_masks(start: StartOptions, networks: NetworkOptions) -> str | None:
    """What masks say which part of a picture is drawn anew: none where --mask_path is a map of networks' regions."""
    return None if networks.applied else start.mask_path


def with_strength(request: GenerationRequest, strength: float, where: str) -> GenerationRequest:
    """The request with its strength; OptionError where no step would be left to do."""
    request = replace(request, strength=strength)
    problem = f"a strength of {strength} leaves none of {request.steps} steps"
    require(request.steps_done >= 1, where, problem, "use more steps or a larger --strength")
    return request
