"""The command line of the generators: flags -> configuration -> requests -> pictures, and what goes wrong on the way.

Everything that can be told without a model is checked before torch is imported.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from library.checkpoints.probe import MODEL_FLAG, probe, resolve_model
from library.cli import control, networks
from library.cli.console import start_console
from library.cli.ending import Ending, leave
from library.generate.config import CONFIG_GROUPS, GenerationConfig
from library.generate.options import PromptOptions
from library.generate.output import prepare_folder
from library.generate.prompt_line import PromptLine, parse_prompt_line, read_prompt_file
from library.generate.request import GenerationRequest, make_requests
from library.options import OptionParser, add_arguments, build
from library.wording import counted

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
        requests = check(script, config)
        folder = prepare_folder(config.output.outdir, max(3 * item.width * item.height for item in requests))
        ending.log_file = folder / f"{Path(parser.prog).stem}.log"
        paths = generate(script, config, requests, folder)
        logger.info("%s in %s", counted(len(paths), "picture"), folder)
    return ending.code


def generate(
    script: Script, config: GenerationConfig, requests: Sequence[GenerationRequest], folder: Path
) -> list[Path]:
    """Load the model and its networks, and make the pictures. This is where torch is loaded."""
    from library.generate import images
    from library.generate.conditions import PromptEncoder
    from library.generate.critics import critic_guidance

    module, _, name = script.family.partition(":")
    family = getattr(importlib.import_module(module), name)()
    plan = images.load_plan(config.compute)
    factories = networks.import_modules(config.networks)
    bundle = family.load(config.checkpoint.model, config.compute.attention, plan)
    networks.attach(factories, config.networks, bundle, plan)
    parts = control.parts(config.control, script.lllite_module, bundle, plan)
    parts += critic_guidance(config.critics, plan)  # last: it asks the U-Net again
    encoder = PromptEncoder(family, bundle, "--max_embeddings_multiples raises it")
    return images.generate(config, requests, images.Engine(family, bundle, encoder, tuple(parts)), folder)


def build_parser(script: Script) -> OptionParser:
    """A parser with one flag per option of the script."""
    parser = OptionParser(description=script.description)
    for group in script.groups():
        add_arguments(parser, group, script.defaults, script.omits)
    return parser


def check(script: Script, config: GenerationConfig) -> list[GenerationRequest]:
    """The pictures asked for; raises OptionError for everything that is wrong without loading a model."""
    if config.checkpoint.tokenizer_cache_dir is not None:
        logger.info("--tokenizer_cache_dir has no effect: the CLIP vocabulary is part of this project")
    config.compute.attention.check_package()
    for note in config.compute.attention.notes():
        logger.info(note)
    networks.check(config.networks)
    picture = config.picture.sized(script.native_size)
    requests = make_requests(read_lines(config.prompts), config.prompts, picture)
    requests = config.control.guided(requests)
    config.critics.check_requests(requests)
    if alike := len(requests) - len(set(requests)):
        logger.warning("%s will be equal to another one: the same prompt with the same seed (--d in its line); "
                       "leave --d out for other seeds", counted(alike, "picture"))  # fmt: skip
    model = config.checkpoint
    source = probe(str(model.ckpt), flag="--ckpt", family=script.models, v2=model.v2, **SCRIPTS)
    control.check(config.control, source.kind)
    config.critics.check_models()
    if config.checkpoint.vae:
        resolve_model(config.checkpoint.vae, "--vae")
    return requests


def read_lines(prompts: PromptOptions) -> list[PromptLine]:
    """The prompts of --from_file, or of --prompt."""
    if prompts.from_file is None:
        return [parse_prompt_line(prompts.prompt or "")]
    if prompts.prompt is not None:
        logger.warning("--prompt has no effect beside --from_file")
    return read_prompt_file(prompts.from_file)
