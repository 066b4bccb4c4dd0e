"""Previews: pictures drawn while training, by the same code as generation draws them.

Training goes on after a round of previews as if there had been none: no random generator but the pictures' own is
used, modes and weights are put back, and nothing is kept but encoded prompts.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from accelerate.utils.memory import should_reduce_batch_size
from PIL import Image

from library.generate.conditions import PromptEncoder
from library.generate.images import Engine, NotFiniteError
from library.generate.options import PictureOptions
from library.generate.output import ModelNames
from library.generate.prompt_line import PromptLine
from library.generate.request import batches, request_of
from library.generate.seeds import LARGEST_SEED
from library.options import OptionError
from library.progress import progress_bar
from library.randomness import seed_for
from library.train.callbacks import Callback
from library.train.guard import Stopped
from library.train.placement import evaluating
from library.train.preview_files import Moment, Preview, PreviewFiles
from library.train.run import Run
from library.wording import counted

logger = logging.getLogger(__name__)

FOLDER = "sample"
BATCH = 4  # pictures drawn together, as far as their settings allow; one at a time where memory runs out
FULL = "the memory is full; smaller pictures (--w, --h in the file of prompts) need less"


@dataclass(frozen=True)
class Drawn:
    """A picture that a process has written."""

    index: int  # of its prompt
    step: int
    path: Path


class Previews(Callback):
    """Draws every prompt's picture when a round is due; each process draws its share of the prompts."""

    def __init__(self, run: Run, lines: Sequence[PromptLine], defaults: PictureOptions, *, is_resumed: bool) -> None:
        """`defaults` hold where a prompt's line does not say otherwise; `is_resumed`: the run goes on from a state."""
        self.run = run
        self.options = run.config.preview
        self.is_resumed = is_resumed
        seeds = (seed_for(run.seed, "preview", index) % (LARGEST_SEED + 1) for index in range(len(lines)))
        self.previews = [
            Preview(index, request_of(line, defaults, line.seeds[0] if line.seeds else seed), bool(line.seeds))
            for index, (line, seed) in enumerate(zip(lines, seeds, strict=True))
        ]
        self.share = self.previews[run.accelerator.process_index :: run.accelerator.num_processes]
        self.encoder = PromptEncoder(run.family, run.bundle)
        self._text_has_learned = False
        self._has_encoded = False  # for the rest of the run
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="previews")
        self._written: Future[list[Drawn]] | None = None

    @functools.cached_property
    def files(self) -> PreviewFiles:
        names = self.run.names
        return PreviewFiles(names.folder / FOLDER, names.name, self.run.start_step)

    def before_first_step(self, step: int) -> None:
        if self.options.sample_at_first and not self.is_resumed:
            epochs_done = step // self.run.plan.steps_per_epoch
            self.draw(Moment(step, epochs_done if self.options.every_n_epochs else None))

    def after_step(self, step: int) -> None:
        if self.options.due_after_step(step):
            self.draw(Moment(step))

    def after_epoch(self, epoch: int, step: int) -> None:
        if self.options.due_after_epoch(epoch):
            self.draw(Moment(step, epoch))

    def at_end(self, step: int) -> None:
        self._finish_round(step)

    def close(self) -> None:
        self._finished_files()
        self._writer.shutdown()

    # ------------------------------------------------------------------------------------------ drawing

    def draw(self, moment: Moment) -> None:
        """One round. What can go wrong with pictures is said in one warning, and training goes on."""
        self._finish_round(moment.step)
        begun = time.monotonic()
        drawn: list[tuple[Preview, Image.Image]] = []
        failures: list[str] = []
        with reported(failures), self._model_at_hand(moment.step) if self.share else contextlib.nullcontext():
            drawn = self._drawn(failures)
        seconds = time.monotonic() - begun
        for preview, image in drawn:
            self._log(preview.index, image, moment.step, now=moment.step)
        self._written = self._writer.submit(self._write, moment, drawn)
        if self.run.stop and len(drawn) < len(self.share):
            logger.info("%s: previews broken off, %d of %d are drawn", moment.caption, len(drawn), len(self.share))
        elif failures:
            logger.warning("%s: %d of %d previews failed, training goes on: %s",
                           moment.caption, len(self.share) - len(drawn), len(self.share), failures[0])  # fmt: skip
        made = counted(len(drawn), "preview")
        logger.info("%s: %s in %.1f s, in %s", moment.caption, made, seconds, self.files.folder)

    def _drawn(self, failures: list[str]) -> list[tuple[Preview, Image.Image]]:
        """The pictures of this process's share that could be drawn; reasons of failures are added to `failures`."""
        drawn: list[tuple[Preview, Image.Image]] = []
        pending = iter(self.share)
        requests = [preview.request for preview in self.share]
        shows_progress = self.run.accelerator.is_local_main_process
        settings = {"total": len(requests), "desc": "previews", "unit": "picture"}
        with progress_bar(**settings, is_inner=True, disable=not shows_progress) as bar:
            for batch in batches(requests, BATCH, self.encoder.windows):
                if self.run.stop:
                    break
                previews = [next(pending) for _ in batch]
                pictures = self._pictures(previews, [] if len(previews) > 1 else failures)
                if not pictures and len(previews) > 1 and not self.run.stop:
                    pictures = [picture for preview in previews for picture in self._pictures([preview], failures)]
                drawn += pictures
                bar.update(len(batch))
        return drawn

    def _pictures(self, previews: Sequence[Preview], failures: list[str]) -> list[tuple[Preview, Image.Image]]:
        """The pictures of one batch; none where it could not be drawn."""
        run = self.run
        with reported(failures), contextlib.suppress(Stopped):
            requests = [preview.request for preview in previews]
            shows_progress = run.accelerator.is_local_main_process
            engine = Engine(run.family, run.bundle, self.encoder)
            images = engine.pictures(requests, show_progress=shows_progress, after_step=run.stop.check)
            return list(zip(previews, images, strict=True))
        return []

    @contextlib.contextmanager
    def _model_at_hand(self, step: int) -> Iterator[None]:
        """Inside the block the model draws as it will after training; afterwards it is as it was."""
        run = self.run
        if self._text_has_learned:
            self.encoder.forget()
        self._text_has_learned = run.target.trains_text(step)
        try:
            with (
                run.weights_for_output(),
                evaluating(run.model),
                on_device(run.bundle.vae, run.device),
                run.accelerator.autocast(),
            ):
                self._encode_ahead()
                yield
        finally:
            if run.device.type == "cuda":
                torch.cuda.empty_cache()  # blocks of pictures' sizes are of no use to training

    def _encode_ahead(self) -> None:
        """Encode all prompts at once where text encoders wait on the CPU, because the run's captions are cached."""
        encoders = [encoder for encoder in self.run.bundle.text_encoders if device_of(encoder) != self.run.device]
        if not encoders or self._has_encoded:
            return
        with contextlib.ExitStack() as stack:
            for encoder in encoders:
                stack.enter_context(on_device(encoder, self.run.device))
            for batch in batches([preview.request for preview in self.share], BATCH, self.encoder.windows):
                self.encoder(batch)
        self._has_encoded = True

    # ------------------------------------------------------------------------------------------ files and logs

    def _write(self, moment: Moment, drawn: Sequence[tuple[Preview, Image.Image]]) -> list[Drawn]:
        names = self._model_names(moment)
        return [
            Drawn(preview.index, moment.step, self.files.add(preview, moment, image, names)) for preview, image in drawn
        ]

    def _finished_files(self) -> list[Drawn]:
        """What this process wrote of the last round, once; none where the disk would not take it."""
        written, self._written = self._written, None
        failures: list[str] = []
        with reported(failures):
            if written is not None:
                return written.result()
        if failures:
            logger.warning("previews were not saved, training goes on: %s", failures[0])
        return []

    def _finish_round(self, now: int) -> None:
        """Wait for the last round's files; the main process logs what others drew, where it can see their files."""
        run = self.run
        finished = self._finished_files()
        if run.accelerator.num_processes > 1:
            own = {preview.index for preview in self.share}
            for drawn in gather_object(finished):
                if run.accelerator.trackers and drawn.index not in own and drawn.path.is_file():
                    with Image.open(drawn.path) as image:
                        self._log(drawn.index, image.convert("RGB"), drawn.step, now=now)

    def _model_names(self, moment: Moment) -> ModelNames:
        """The model's file, and the file that holds what is drawn where it is saved now, else the run's final one."""
        run, file = self.run, self.run.names.final_file()
        if moment.epoch is not None and run.plan.saves_after_epoch(moment.epoch):
            file = run.names.epoch_file(moment.epoch)
        elif run.plan.saves_at(moment.step):
            file = run.names.step_file(moment.step)
        if run.average is not None:
            file = run.names.average_of(file)
        name = file.name.removesuffix(run.names.extension)
        return ModelNames.of(Path(run.bundle.source.path), run.target.prompt_tag(name) if moment.step else "")

    def _log(self, index: int, image: Image.Image, step: int, *, now: int) -> None:
        """Hand a picture of `step` to the trackers, which only the main process has; not all can log in the past."""
        name = f"sample_{index}"
        for tracker in self.run.accelerator.trackers:
            writer: Any = tracker
            if writer.name == "tensorboard":
                writer.log_images({name: np.asarray(image)[None]}, step=step, dataformats="NHWC")
            else:
                writer.log_images({name: [image]}, step=now)


@contextlib.contextmanager
def reported(failures: list[str]) -> Iterator[None]:
    """Turn what can go wrong with pictures into sentences; anything else is a mistake in the program and goes on up."""
    try:
        yield
    except (OptionError, NotFiniteError, OSError) as error:
        failures.append(str(error))
    except RuntimeError as error:
        if not (isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)):
            raise
        failures.append(FULL)


@contextlib.contextmanager
def on_device(module: torch.nn.Module, device: torch.device) -> Iterator[None]:
    """Inside the block the module is on `device`; afterwards it is back where it was."""
    home = device_of(module)
    module.to(device)
    try:
        yield
    finally:
        module.to(home)


def device_of(module: torch.nn.Module) -> torch.device:
    return next(module.parameters()).device
