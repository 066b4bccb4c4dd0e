"""The files of previews: a picture per prompt and round, and a sheet per prompt that shows all of its rounds.

<output_dir>/sample/[name_]<000100 | e000001>_<prompt>_<time>[_<seed>].png
<output_dir>/sample/[name_]prompt<prompt>.png
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from library.generate.contact_sheet import MOST, SheetPicture, contact_sheet, thinned, thumbnail
from library.generate.output import ModelNames, encode_png, metadata, numbered_names, replace_file, write_new
from library.generate.request import GenerationRequest

FLAG = "--output_dir"


@dataclass(frozen=True)
class Preview:
    """One picture that is drawn in every round."""

    index: int  # of its prompt in the file of prompts, from 0
    request: GenerationRequest
    has_own_seed: bool  # False: the seed follows from the run's

    @property
    def summary(self) -> str:
        """Everything about the picture but its prompt, in one line."""
        request = self.request
        facts = [request.sampler, f"{request.steps} steps", f"guidance {request.scale:g}", f"seed {request.seed}"]
        facts.append(f"{request.width} x {request.height}")
        return ", ".join(facts + [f"without: {request.negative_prompt}"] * bool(request.negative_prompt))


@dataclass(frozen=True)
class Moment:
    """When a round is drawn: after how many updates, and, where rounds follow epochs, after which epoch."""

    step: int
    epoch: int | None = None

    @property
    def label(self) -> str:
        """As file names have it."""
        return f"{self.step:06d}" if self.epoch is None else f"e{self.epoch:06d}"

    @property
    def caption(self) -> str:
        return f"step {self.step}" if self.epoch is None else f"epoch {self.epoch}, step {self.step}"


class PreviewFiles:
    """Writes pictures and sheets into `folder`. A resumed run goes on with the sheets that it has there."""

    def __init__(self, folder: Path, name: str | None, resumed_at: int) -> None:
        """`resumed_at`: updates done when this run began; of pictures in the folder, later ones are another run's."""
        self.folder = folder
        self.prefix = f"{name}_" if name else ""
        self.resumed_at = resumed_at
        self._rounds: dict[int, list[SheetPicture]] = {}

    def add(self, preview: Preview, moment: Moment, image: Image.Image, names: ModelNames) -> Path:
        """Write one picture and its prompt's sheet; returns its path. OptionError where the disk won't take them."""
        if preview.index not in self._rounds:
            self._rounds[preview.index] = list(self._earlier(preview))
        self.folder.mkdir(parents=True, exist_ok=True)
        texts = metadata(preview.request, names) | {"step": str(moment.step), "caption": moment.caption}
        path = write_new(self.folder, numbered_names(self._stem(preview, moment)), encode_png(image, texts), FLAG)
        rounds = self._rounds[preview.index]
        rounds.append(SheetPicture(thumbnail(image), moment.caption))
        if len(rounds) > 2 * MOST:
            rounds[:] = thinned(rounds)
        sheet = contact_sheet(preview.request.prompt, preview.summary, thinned(rounds))
        replace_file(self.folder / f"{self.prefix}prompt{preview.index:02d}.png", encode_png(sheet, {}), FLAG)
        return path

    def _stem(self, preview: Preview, moment: Moment) -> str:
        seed = f"_{preview.request.seed}" if preview.has_own_seed else ""
        return f"{self.prefix}{moment.label}_{preview.index:02d}_{time.strftime('%Y%m%d%H%M%S')}{seed}"

    def _pictures(self, preview: Preview, label: str) -> Iterator[Path]:
        pattern = re.compile(rf"{re.escape(self.prefix)}{label}_{preview.index:02d}_\d{{14}}(_\d+)*\.png")
        if self.folder.is_dir():
            yield from (path for path in self.folder.iterdir() if pattern.fullmatch(path.name))

    def _earlier(self, preview: Preview) -> Iterator[SheetPicture]:
        """What the run that is gone on with has drawn of this prompt: the newest picture of each step."""
        if not self.resumed_at:
            return
        newest: dict[int, tuple[Path, str]] = {}
        for path in sorted(self._pictures(preview, r"e?\d{6,}"), key=lambda path: path.stat().st_mtime_ns):
            with Image.open(path) as image:
                texts = image.info
                is_same = (texts.get("prompt"), texts.get("seed")) == (
                    preview.request.prompt,
                    str(preview.request.seed),
                )
            if is_same and texts.get("step", "").isdecimal() and int(texts["step"]) <= self.resumed_at:
                newest[int(texts["step"])] = path, texts.get("caption", "")
        for step in sorted(newest):
            path, caption = newest[step]
            with Image.open(path) as image:
                yield SheetPicture(thumbnail(image), caption)
