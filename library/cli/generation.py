"""The command line of the generators: flags -> configuration -> requests -> pictures, and what goes wrong on the way.

Everything that can be told without a model is checked before torch is imported.
"""

from __future__ import annotations

import importlib
import itertools
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.checkpoints.probe import MODEL_FLAG, probe, resolve_model
from library.cli import control, embeddings, grids, live_prompts, networks
from library.cli.console import start_console
from library.cli.ending import USER_MISTAKE, Ending, leave
from library.generate.completion import Completion
from library.generate.config import CONFIG_GROUPS, GenerationConfig
from library.generate.options import PictureOptions, PromptOptions
from library.generate.output import prepare_folder
from library.generate.prompt_files import prompts_of_pictures, read_prompts
from library.generate.prompt_line import PromptLine, RawLine
from library.generate.region_map import region_map
from library.generate.request import BrokenLines, GenerationRequest, RequestMaker
from library.options import OptionError, OptionParser, add_arguments, build, require
from library.wording import counted

if TYPE_CHECKING:
    from library.families.base import ModelBundle
    from library.generate.images import Round

logger = logging.getLogger(__name__)

SCRIPTS = {"sd_script": "gen_img_diffusers.py", "sdxl_script": "sdxl_gen_img.py"}  # named to those who took the other


@dataclass(frozen=True)
class Script:
    """What a generator's entry script is."""

    description: str
    family: str  # "module:Class"
    models: str = "sd"  # the family of models it takes: "sd" or "sdxl"
    native_size: int = 512  # pixels: width and height where none is given
    omits: frozenset[str] = frozenset()  # options of its groups that it does not offer: they keep their defaults
    defaults: Mapping[str, Any] = field(default_factory=dict)
    lllite_module: str = ""  # the Python module for ControlNet-LLLite files, where there is such a thing

    def groups(self) -> tuple[type, ...]:
        return tuple(CONFIG_GROUPS.values())


def main(script: Script, argv: Sequence[str] | None = None) -> None:
    """Run a generator and end the program with its exit code."""
    leave(run(script, argv))


def run(script: Script, argv: Sequence[str] | None = None) -> int:
    """0 when done, 2 for a mistake of the user's, 130 when interrupted, 1 for anything else."""
    parser = build_parser(script)
    values = vars(parser.parse_strictly(argv))
    start_console()
    with Ending(parser.prog, renamed={MODEL_FLAG: "--ckpt"}) as ending:
        config = GenerationConfig(**{name: build(group, values) for name, group in CONFIG_GROUPS.items()})
        asked = check(script, config)
        folder = prepare_folder(config.output.outdir, max((3 * r.width * r.height for r in asked.requests), default=0))
        ending.log_file = folder / f"{Path(parser.prog).stem}.log"
        if config.grid.is_on:

            def draw_all(own: GenerationConfig, draw: grids.Draw) -> list[Path]:
                return generate(script, own, asked, folder, draw)

            paths = grids.generate_grid(draw_all, config, asked.requests, folder)
        else:
            paths = generate(script, config, asked, folder)
        logger.info("%s in %s", counted(len(paths), "picture"), folder)
        if asked.broken.said:
            logger.error("%s could not be drawn", counted(len(asked.broken.said), "prompt"))
            ending.code = USER_MISTAKE
    return ending.code


@dataclass(frozen=True)
class Asked:
    """What a run is asked for."""

    requests: list[GenerationRequest]  # those that are known before anything is drawn
    maker: RequestMaker  # makes those that show only later
    broken: BrokenLines


def generate(
    script: Script, config: GenerationConfig, asked: Asked, folder: Path, draw: grids.Draw | None = None
) -> list[Path]:
    """Load the model and its networks, and make the pictures, or let `draw` do so. This is where torch is loaded."""
    from library.generate import images
    from library.generate.clip_vision import clip_vision
    from library.generate.conditions import PromptEncoder
    from library.generate.critics import critic_guidance
    from library.generate.deep_shrink import DeepShrink
    from library.generate.gradual_latent import GradualLatent
    from library.generate.highres import create_upscaler
    from library.generate.inpainting import Inpainting, InpaintingModel
    from library.generate.preview_window import PreviewWindows
    from library.models.vae_strips import compute_in_strips

    module, _, name = script.family.partition(":")
    family = getattr(importlib.import_module(module), name)()
    plan = images.load_plan(config.compute)
    factories = networks.import_modules(config.networks)
    get_prompter = live_prompts.imported_prompter(config.prompts)
    upscaler = create_upscaler(config.highres.upscaler)
    words = embeddings.read(config.embeddings)
    bundle = family.load(config.checkpoint.model, config.compute.attention, plan)
    embeddings.teach(words, bundle)
    if config.compute.opt_channels_last:
        images.put_channels_last(bundle)
    if config.vae.vae_slices is not None:
        compute_in_strips(bundle.vae, config.vae.vae_slices)
    in_use = networks.attach(factories, config.networks, bundle, plan, is_regional=region_map(config) is not None)
    encoder = PromptEncoder(family, bundle, "--max_embeddings_multiples raises it")
    encoder.networks = in_use
    own = (*embeddings.part_for(words, encoder), DeepShrink(), GradualLatent(), InpaintingModel())
    controls = control.parts(config.control, script.lllite_module, bundle, config.compute.attention, plan)
    controls += clip_vision(config.clip_vision, bundle, plan)
    parts = (*own, *controls, *critic_guidance(config.critics, plan), Inpainting())
    parts = parts if in_use is None else (in_use, *parts)
    engine = images.Engine(family, bundle, encoder, parts, config.vae, upscaler)
    show = None if config.prompts.no_preview else PreviewWindows().show
    draw = draw or images.generate
    return draw(config, rounds(config, asked, get_prompter, bundle), engine, folder, show)


def rounds(
    config: GenerationConfig, asked: Asked, get_prompter: live_prompts.GetPrompter | None, bundle: ModelBundle
) -> Iterable[Round]:
    """What is known, then what a module of the user's makes, then what is typed."""
    from library.generate.images import Round

    known = [Round(asked.requests)] if asked.requests else []
    live = live_prompts.LivePrompts(config, asked.maker, check_requests, asked.broken)
    module = [Round(live.of_module(get_prompter, bundle))] if get_prompter is not None else []
    typed = (Round(requests, is_typed=True) for requests in live.typed())
    return itertools.chain(known, module, typed) if config.prompts.interactive else [*known, *module]


def build_parser(script: Script) -> OptionParser:
    """A parser with one flag per option of the script."""
    parser = OptionParser(description=script.description)
    for group in script.groups():
        add_arguments(parser, group, script.defaults, script.omits)
    return parser


def check(script: Script, config: GenerationConfig) -> Asked:
    """The pictures asked for; raises OptionError for everything that is wrong without loading a model."""
    for note in config.check():
        logger.warning(note)
    if config.checkpoint.tokenizer_cache_dir is not None:
        logger.info("--tokenizer_cache_dir has no effect: the CLIP vocabulary is part of this project")
    config.compute.attention.check_package()
    for note in config.compute.attention.notes():
        logger.info(note)
    networks.check(config.networks)
    config.embeddings.check()
    for note in config.start.notes():
        logger.info(note)
    completion = Completion.of(config, script.models)
    for note in config.networks.notes(is_regional=completion.region_map is not None):
        logger.info(note)
    asked = read_requests(config, config.picture.sized(script.native_size), completion)
    networks.check_multipliers(config.networks, [request.multipliers or () for request in asked.requests])
    check_requests(asked.requests)
    model = config.checkpoint
    source = probe(str(model.ckpt), flag="--ckpt", family=script.models, v2=model.v2, may_inpaint=True, **SCRIPTS)
    control.check(config.control, source.kind)
    config.critics.check_models()
    config.clip_vision.check_model(config.start.image_path)
    networks.check_kind(config.networks, source.kind)
    if config.networks.network_show_meta:
        networks.show_metadata(config.networks)
    grids.check(config, script.models, source.kind, SCRIPTS)
    if config.checkpoint.vae:
        resolve_model(config.checkpoint.vae, "--vae")
    return asked


def check_requests(requests: Sequence[GenerationRequest]) -> None:
    """Say or raise what can be told of pictures without a model: of those known beforehand, or of one live prompt's."""
    if alike := len(requests) - len(set(requests)):
        logger.warning("%s will be equal to another one: the same prompt with the same seed (--d in its line); "
                       "leave --d out for other seeds", counted(alike, "picture"))  # fmt: skip


def read_requests(config: GenerationConfig, picture: PictureOptions, completion: Completion) -> Asked:
    """The pictures of all prompts that are known beforehand."""
    prompts = config.prompts
    live_prompts.check(prompts)
    lines = read_lines(prompts, completion.sources.images)
    if config.output.use_original_file_name and not completion.sources.images:
        logger.warning("--use_original_file_name has no effect without --image_path")
    if prompts.interactive and prompts.n_iter > 1:
        logger.warning("--n_iter has no effect beside --interactive")
        prompts = replace(prompts, n_iter=1)
    maker = RequestMaker(prompts, picture, None if prompts.is_live else len(lines), completion)
    broken = BrokenLines()
    requests = maker.of_list(lines, broken if prompts.skip_errors else None)
    if not requests and not prompts.is_live:
        raise OptionError("--skip_errors", "no prompt is left", "correct the lines named above")
    return Asked(requests, maker, broken)


def read_lines(prompts: PromptOptions, images: Sequence[str]) -> Sequence[RawLine | PromptLine]:
    """The prompts of --from_file, of --prompt or of the pictures to start from; none where all of them show later."""
    if prompts.from_module is not None:
        for name in ("from_file", "prompt"):
            if getattr(prompts, name) is not None:
                logger.warning("--%s has no effect beside --from_module", name)
        return []
    if prompts.from_file is not None:
        if prompts.prompt is not None:
            logger.warning("--prompt has no effect beside --from_file")
        return read_prompts(prompts.from_file)
    if prompts.prompt is not None:
        return [RawLine(prompts.prompt)]
    way_out = 'give --prompt "a photo of a cat", or a file of prompts with --from_file'
    require(prompts.interactive or bool(images), "--prompt", "no prompt given", way_out)
    return [] if prompts.interactive else prompts_of_pictures(images)
