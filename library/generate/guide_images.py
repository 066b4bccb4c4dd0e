"""Guide images of ControlNets and critics: which file is whose. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from library.generate.control_options import GUIDE, ControlOptions
from library.generate.sources import files_of, size_of


@dataclass(frozen=True)
class GuideImages:
    """The files of --guide_image_path, each taken in turn."""

    paths: tuple[str, ...] = ()
    per_picture: int = 1  # one for each network that sees them; one for critics alone

    @classmethod
    def of(cls, options: ControlOptions) -> GuideImages:
        """Raises OptionError for paths that are no pictures, and for folders without any."""
        paths = [path for given in options.guide_image_path or () for path in files_of(given, GUIDE)]
        for path in paths:
            size_of(path, GUIDE)
        return cls(tuple(paths), max(len(options.files), 1))

    def of_picture(self, number: int) -> tuple[str, ...]:
        """Of picture p, counted from 0, and n networks: the files p n, p n + 1 ..., over and over."""
        if not self.paths:
            return ()
        start = number * self.per_picture
        return tuple(self.paths[index % len(self.paths)] for index in range(start, start + self.per_picture))
