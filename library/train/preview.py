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
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils.memory import should_reduce_batch_size
from PIL import Image
from tqdm import tqdm

from library.checkpoints.safetensors_io import file_sha256
from library.generate.conditions import PromptEncoder
from library.generate.images import NotFiniteError, make_pictures
from library.generate.options import PictureOptions
from library.generate.output import ModelNames
from library.generate.prompt_line import PromptLine
from library.generate.request import LARGEST_SEED, batches, request_of
from library.options import OptionError
from library.randomness import seed_for
from library.train.callbacks import Callback
from library.train.placement import evaluating
from library.train.preview_files import Moment, Preview, PreviewFiles
from library.train.run import Run

logger = logging.getLogger(__name__)

FOLDER = "sample"
BATCH = 4  # pictures drawn together, as far as their settings allow; one at a time where memory runs out
FULL = "the memory is full; smaller pictures (--w, --h in the file of prompts) need less"


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
        self._unlogged: list[tuple[Preview, Moment, float]] = []  # of other processes, and when the round began
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="previews")
        self._written: Future[None] | None = None

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
        self._wait_for_files()
        if self.run.accelerator.num_processes > 1:
            self.run.accelerator.wait_for_everyone()
            self._log_others(step)

    def close(self) -> None:
        self._wait_for_files()
        self._writer.shutdown()

    # ------------------------------------------------------------------------------------------ drawing

    def draw(self, moment: Moment) -> None:
        """One round. What can go wrong with pictures is said in one warning, and training goes on."""
        self._wait_for_files()
        self._log_others(moment.step)
        begun = time.time()
        drawn: list[tuple[Preview, Image.Image]] = []
        failures: list[str] = []
        with reported(failures), self._model_at_hand(moment.step) if self.share else contextlib.nullcontext():
            drawn = self._drawn(failures)
        seconds = time.time() - begun
        for preview, image in drawn:
            self._log(preview, image, moment.step, now=moment.step)
        if self.run.accelerator.trackers:
            self._unlogged += [(preview, moment, begun) for preview in self.previews if preview not in self.share]
        self._written = self._writer.submit(self._write, moment, drawn)
        if failures:
            logger.warning("%s: %d of %d previews failed, training goes on: %s",
                           moment.caption, len(self.share) - len(drawn), len(self.share), failures[0])  # fmt: skip
        logger.info("%s: %d previews in %.1f s, in %s", moment.caption, len(drawn), seconds, self.files.folder)

    def _drawn(self, failures: list[str]) -> list[tuple[Preview, Image.Image]]:
        """The pictures of this process's share that could be drawn; reasons of failures are added to `failures`."""
        drawn: list[tuple[Preview, Image.Image]] = []
        pending = iter(self.share)
        requests = [preview.request for preview in self.share]
        shows_progress = self.run.accelerator.is_local_main_process
        with tqdm(total=len(requests), desc="previews", unit="picture", leave=False, disable=not shows_progress) as bar:
            for batch in batches(requests, BATCH, self.encoder.windows):
                previews = [next(pending) for _ in batch]
                pictures = self._pictures(previews, [] if len(previews) > 1 else failures)
                if not pictures and len(previews) > 1:
                    pictures = [picture for preview in previews for picture in self._pictures([preview], failures)]
                drawn += pictures
                bar.update(len(batch))
        return drawn

    def _pictures(self, previews: Sequence[Preview], failures: list[str]) -> list[tuple[Preview, Image.Image]]:
        """The pictures of one batch; none where it could not be drawn."""
        run = self.run
        with reported(failures):
            requests = [preview.request for preview in previews]
            shows_progress = run.accelerator.is_local_main_process
            images = make_pictures(run.family, run.bundle, requests, self.encoder, show_progress=shows_progress)
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

    def _write(self, moment: Moment, drawn: Sequence[tuple[Preview, Image.Image]]) -> None:
        names = self._model_names(moment)
        for preview, image in drawn:
            self.files.add(preview, moment, image, names)

    def _wait_for_files(self) -> None:
        written, self._written = self._written, None
        failures: list[str] = []
        with reported(failures):
            if written is not None:
                written.result()
        if failures:
            logger.warning("previews were not saved, training goes on: %s", failures[0])

    def _model_names(self, moment: Moment) -> ModelNames:
        """The model's file, and the file that holds what has been trained so far where it is saved now."""
        run, path = self.run, Path(self.run.bundle.source.path)
        if moment.step == run.plan.steps:
            file = run.names.final_file()
        elif moment.epoch is None:
            file = run.names.step_file(moment.step)
        else:
            file = run.names.epoch_file(moment.epoch)
        if run.average is not None:
            file = run.names.average_of(file)
        name = file.name.removesuffix(run.names.extension)
        return ModelNames(
            model=path.stem,
            model_hash=file_sha256(path)[:10] if path.is_file() else "",
            networks=run.target.prompt_tag(name) if moment.step else "",
        )

    def _log(self, preview: Preview, image: Image.Image, step: int, *, now: int) -> None:
        """Hand a picture of `step` to the trackers, which only the main process has; not all can log in the past."""
        name = f"sample_{preview.index}"
        for tracker in self.run.accelerator.trackers:
            writer: Any = tracker
            if writer.name == "tensorboard":
                writer.log_images({name: np.asarray(image)[None]}, step=step, dataformats="NHWC")
            else:
                writer.log_images({name: [image]}, step=now)

    def _log_others(self, step: int) -> None:
        """Log what other processes drew in earlier rounds, where their files can be seen from here."""
        waiting, self._unlogged = self._unlogged, []
        for preview, moment, begun in waiting:
            path = self.files.find(preview, moment, begun)
            if path is not None:
                with Image.open(path) as image:
                    self._log(preview, image.convert("RGB"), moment.step, now=step)


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
