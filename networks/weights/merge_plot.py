"""The picture of what merged LoRAs do together: singular-value energy of the weighted sum, per block."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from library.progress import progress_bar
from library.wording import counted
from networks.weights.block_names import block_name
from networks.weights.energy_plot import Spectrum, draw_energy
from networks.weights.merge_inputs import Source
from networks.weights.module_changes import is_plain
from networks.weights.svd import sum_svd

logger = logging.getLogger(__name__)


def draw_sum(sources: Sequence[Source], path: Path) -> None:
    """Draw the exact sum of ratio x alpha / rank x up @ down over the sources; other kinds of modules are left out.

    The factors side by side are decomposed (a QR of each), so that no product is made.
    """
    names: dict[str, list[Source]] = {}
    for source in sources:
        for name in source.file.pairs:
            if is_plain(source.file, name) and source.ratio_of(name):
                names.setdefault(name, []).append(source)
    spectra: dict[str, list[Spectrum]] = {}
    for name in progress_bar(iterable=names, desc="directions", total=len(names)):
        downs, ups = [], []
        for source in names[name]:
            down, up = source.file.pair(name)
            downs.append(down.flatten(1))
            ups.append(up.flatten(1) * (source.ratio_of(name) * source.file.scale(name)))
        svd = sum_svd(downs, ups)
        spectra.setdefault(block_name(name), []).append(Spectrum.of(svd.values_K, svd.energy, len(svd.values_K)))
    others = {name for source in sources for name in source.file.modules} - set(names)
    if not spectra:
        logger.warning("--plot: nothing is drawn, because no module is a plain LoRA")
        return
    if others:
        logger.warning("--plot leaves out %s that are no plain LoRA", counted(len(others), "module"))
    draw_energy(spectra, path)
    logger.info("%s: the picture of what the strongest directions hold", path)
