"""Contact sheets of the generators: the same requests with each of the weights that are compared."""

from __future__ import annotations

import contextlib
import io
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.checkpoints.probe import probe
from library.cli import networks
from library.generate.config import GenerationConfig
from library.generate.grid import Axes, Variant, blocks
from library.generate.grid_options import NETWORKS, GridOptions
from library.generate.network_options import NetworkOptions
from library.generate.output import numbered_names, write_new
from library.generate.request import GenerationRequest
from library.options import OptionError, require
from library.targets.options import NetworkOptions as Checked
from library.wording import counted

if TYPE_CHECKING:
    from library.generate.images import Engine, Round

    Draw = Callable[[GenerationConfig, Iterable[Round], Engine, Path, Any], list[Path]]
    DrawAll = Callable[[GenerationConfig, Draw], list[Path]]  # load what the configuration names, and draw

logger = logging.getLogger(__name__)


def check(config: GenerationConfig, family: str, kind: str, scripts: dict[str, str]) -> None:
    """Raise OptionError for what can't be compared, as far as that shows without torch; `kind` is that of --ckpt."""
    options = config.grid
    if not options.is_on:
        return
    way_out = "use --prompt or --from_file"
    require(not config.prompts.is_live, "--grid", "all prompts have to be known beforehand", way_out)
    way_out = "leave out one of them"
    require(not config.highres.highres_fix_save_1st, "--grid", "shows no --highres_fix_save_1st", way_out)
    axes = Axes.of(str(config.checkpoint.ckpt), options)
    kinds, v2 = {axes.ckpts[0]: kind}, config.checkpoint.v2
    for ckpt in axes.ckpts[1:]:
        kinds[ckpt] = probe(ckpt, flag="--grid_ckpts", family=family, v2=v2, may_inpaint=True, **scripts).kind
    for file in axes.networks:
        with _named_as_asked():
            Checked(network_module=options.grid_network_module, network_weights=file).check_before_start()
    of_all = [(file.path, networks.WEIGHTS) for file in config.networks.files]
    compared = [(file, NETWORKS) for file in axes.networks]
    for (ckpt, of_ckpt), (file, flag) in itertools.product(kinds.items(), of_all + compared):
        networks.check_file_kind(file, of_ckpt, flag, ckpt)


@contextlib.contextmanager
def _named_as_asked() -> Iterator[None]:
    """What is said of networks names the flags that they come from here."""
    try:
        yield
    except OptionError as error:
        said = str(error).replace(networks.WEIGHTS, NETWORKS).replace("--network_module", "--grid_network_module")
        raise OptionError("", said) from None


def generate_grid(
    draw_all: DrawAll, config: GenerationConfig, requests: Sequence[GenerationRequest], folder: Path
) -> list[Path]:
    """Draw all requests with all weights, each model loaded once, and put them on sheets; returns the pictures.

    What is finished when something goes wrong goes on a sheet, too.
    """
    axes = Axes.of(str(config.checkpoint.ckpt), config.grid)
    num_variants = sum(len(axes.variants(ckpt)) for ckpt in axes.ckpts)
    logger.info("contact sheet: %s of each of %s", counted(num_variants, "version"), counted(len(requests), "picture"))
    drawn: dict[Variant, list[Path]] = {}
    try:
        for ckpt in axes.ckpts:
            comparison = _Comparison(axes.variants(ckpt), config.grid, drawn)
            draw_all(replace(config, checkpoint=replace(config.checkpoint, ckpt=ckpt)), comparison.draw)
    finally:
        if any(drawn.values()):
            write_sheets(axes, requests, drawn, folder)
    return [path for paths in drawn.values() for path in paths]


class _Comparison:
    """Draws with all networks and multipliers that one model is compared with."""

    def __init__(self, variants: Sequence[Variant], options: GridOptions, drawn: dict[Variant, list[Path]]) -> None:
        self._variants = variants
        self._options = options
        self._drawn = drawn

    def draw(
        self, config: GenerationConfig, rounds: Iterable[Round], engine: Engine, folder: Path, show: Any
    ) -> list[Path]:
        """As library.generate.images.generate, once for each variant; the model stays as it is."""
        from library.generate import images
        from library.targets.detaching import networks_taken_off

        rounds, made = list(rounds), []
        for variant in self._variants:
            own = self._network(variant)
            with networks_taken_off((engine.bundle.unet, *engine.bundle.text_encoders)):
                with _named_as_asked():
                    networks.attach(networks.import_modules(own), own, engine.bundle, networks.plan_of(engine.bundle))
                engine.encoder.forget()
                named = replace(config, networks=config.networks.with_more(own))
                self._drawn[variant] = []  # is filled as pictures are finished: what was begun is shown, too
                images.generate(named, rounds, engine, folder, show, paths=self._drawn[variant])
            made += self._drawn[variant]
        return made

    def _network(self, variant: Variant) -> NetworkOptions:
        if not variant.network:
            return NetworkOptions()
        module = self._options.grid_network_module
        return NetworkOptions((module,), (variant.network,), (variant.multiplier,))


def write_sheets(
    axes: Axes, requests: Sequence[GenerationRequest], drawn: dict[Variant, list[Path]], folder: Path
) -> list[Path]:
    """grid.png and grid.html, numbered where there are such files; returns their paths."""
    from library.generate.grid_page import grid_page
    from library.generate.grid_sheet import grid_sheet

    shown, data = blocks(axes, requests, drawn), io.BytesIO()
    grid_sheet(shown).save(data, "PNG")
    sheet = write_new(folder, numbered_names("grid"), data.getvalue())
    names = numbered_names(sheet.stem, ".html")
    page = write_new(folder, names, grid_page(shown, folder).encode())
    logger.info("contact sheet: %s and %s", sheet, page)
    return [sheet, page]
