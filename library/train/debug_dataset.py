"""--debug_dataset: no training, but a look at the first epoch's samples, as pictures and as a table."""

from __future__ import annotations

import logging
import os
import sys
import webbrowser
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from pathlib import Path

import numpy as np
from accelerate import Accelerator

from library.data.inspect import LONGEST_SIDE, ShownSample, write_table
from library.diffusion.noise import NoiseSource
from library.families.base import ModelFamily
from library.text.lengths import count_tokens
from library.text.tokens import WINDOW
from library.train import placement
from library.train.beginning import Beginning, begin
from library.train.data_problems import data_problems
from library.train.dataset_sheets import SAMPLES_PER_SHEET, Card, dataset_sheet
from library.train.planning import findings_of
from library.train.preflight import CheckedRun, check_writable
from library.train.report import aligned, warnings_of

logger = logging.getLogger(__name__)

MOST_SHEETS = 20  # samples beyond them are in the table only
NUM_PICTURED = SAMPLES_PER_SHEET * MOST_SHEETS
ROWS_TOLD = 20  # of the table, on the screen
CAPTION_LETTERS = 60  # of each caption there


def show_dataset(checked: CheckedRun, family: ModelFamily) -> int:
    """Write <output_dir>/<name>-dataset: picture sheets and a table of all samples; returns the exit code."""
    config = checked.config
    accelerator = placement.make_accelerator(config, autocast=False)
    begun = begin(checked, accelerator, family)
    if not accelerator.is_main_process:
        return 0
    folder = checked.names.folder / f"{checked.names.name or 'last'}-dataset"
    check_writable(folder, "--debug_dataset")
    bundle = family.outline(config.model, placement.load_plan(config, accelerator.device))
    tokenizers = bundle.tokenizers
    findings = findings_of(checked, begun, bundle, accelerator.num_processes)
    for warning in warnings_of(data_problems(findings, config.source, config.masks)):
        logger.warning("%s", warning)
    pictures = _Pictures()
    cards = list(_cards(checked, begun, accelerator, family, tokenizers, pictures))
    sheets = write_sheets(folder, checked.names.name or "last", cards, pictures)
    write_table(folder / "samples.csv", ((card.sample, card.num_tokens, card.num_cut_off) for card in cards))
    logger.info("The first epoch's samples:\n%s", _told(cards))
    logger.info("picture sheets and a table of %d samples: %s", len(cards), folder)
    if has_screen():
        open_picture(sheets[0])
    return 0


class _Pictures:
    """The pictures of the first samples, in one block.

    Small arrays that stay, made between large ones that go, would keep the memory of these from being used again.
    """

    def __init__(self) -> None:
        self.sizes_hw: list[tuple[int, int]] = []
        self._block = np.empty((NUM_PICTURED, LONGEST_SIDE, LONGEST_SIDE, 3), np.uint8)

    def keep(self, pixels_HWC: np.ndarray) -> None:
        """The next sample's picture."""
        height, width = pixels_HWC.shape[:2]
        self._block[len(self.sizes_hw), :height, :width] = pixels_HWC
        self.sizes_hw.append((height, width))

    def on(self, card: Card, index: int) -> Card:
        """The card of the index-th sample with its picture."""
        height, width = self.sizes_hw[index]
        return replace(card, sample=replace(card.sample, pixels_HWC=self._block[index, :height, :width]))


def _cards(
    checked: CheckedRun,
    begun: Beginning,
    accelerator: Accelerator,
    family: ModelFamily,
    tokenizers: Sequence,
    pictures: _Pictures,
) -> Iterator[Card]:
    """Without their pictures, which `pictures` gets."""
    config, text = checked.config, checked.config.text
    samples = begun.data.first_epoch(
        num_pictured=NUM_PICTURED,
        workers=config.loader.max_data_loader_n_workers,
        draw=NoiseSource(config.noise, begun.seed),
        tokenize=partial(family.tokenize, tokenizers, windows=text.token_windows, weighted=text.weighted_captions),
        accumulation=begun.plan.accumulation,
        max_train_steps=begun.plan.steps,
        prior_loss_weight=config.loss.prior_loss_weight,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
    )
    for sample in samples:
        if sample.pixels_HWC is not None:
            pictures.keep(sample.pixels_HWC)
        (num_tokens,) = count_tokens(tokenizers[0], [sample.caption], weighted=text.weighted_captions)
        yield Card(replace(sample, pixels_HWC=None), num_tokens, max(0, num_tokens - WINDOW * text.token_windows))


def write_sheets(folder: Path, name: str, cards: Sequence[Card], pictures: _Pictures) -> list[Path]:
    """The first sheets of the samples, in place of those of an earlier look; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("sheet_???.png"):
        old.unlink()
    sizes = [len(list(batch)) for _, batch in groupby(cards, key=lambda card: card.sample.batch)]
    size_of_card = [size for size in sizes for _ in range(size)]
    paths = []
    for number in range(min(MOST_SHEETS, -(-len(cards) // SAMPLES_PER_SHEET))):
        first = number * SAMPLES_PER_SHEET
        last = min(first + SAMPLES_PER_SHEET, len(cards))
        shown = [pictures.on(cards[index], index) for index in range(first, last)]
        title = f"{name}: samples {first + 1} to {last} of {len(cards)} in the first epoch"
        batches = f"batches {shown[0].sample.batch} to {shown[-1].sample.batch} of {len(sizes)}"
        subtitle = (
            f"{batches}; each picture as the model gets it: cut, coloured, mirrored, what a mask leaves out in grey"
        )
        paths.append(folder / f"sheet_{number + 1:03d}.png")
        dataset_sheet(title, subtitle, shown, size_of_card[first:last]).save(paths[-1])
    return paths


def _told(cards: Sequence[Card]) -> str:
    header = ("batch", "image", "size", "repeats", "mirrored", "tokens", "caption")
    rows = [header, *(_row(card.sample, card.num_tokens) for card in cards[:ROWS_TOLD])]
    more = [f"  and {len(cards) - ROWS_TOLD} more"] if len(cards) > ROWS_TOLD else []
    return "\n".join([*aligned(rows, (0, 3, 5)), *more])


def _row(sample: ShownSample, num_tokens: int) -> tuple[str, ...]:
    caption = sample.caption.replace("\n", " ")
    short = caption if len(caption) <= CAPTION_LETTERS else f"{caption[:CAPTION_LETTERS]}..."
    repeats = "" if sample.repeats is None else str(sample.repeats)
    size, name = f"{sample.size_wh[0]}x{sample.size_wh[1]}", os.path.basename(sample.path)
    return str(sample.batch), name, size, repeats, "yes" if sample.is_mirrored else "", str(num_tokens), short


# ---------------------------------------------------------------------------------------------- screen


def has_screen() -> bool:
    """Whether a window could be seen."""
    if os.name == "nt" or sys.platform == "darwin":
        return True
    return bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def open_picture(path: Path) -> None:
    """Show a picture in the system's viewer."""
    if os.name == "nt":
        os.startfile(path)  # type: ignore[attr-defined]
    else:
        webbrowser.open(path.resolve().as_uri())
