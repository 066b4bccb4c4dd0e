"""What finding and checking the images brought to light, beyond the images themselves: what reports are made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from library.data.folder_contents import FolderContents
from library.data.index import DataIndex
from library.data.lookalikes import Looks


@dataclass(frozen=True)
class Scan:
    """One look at all folders of a run."""

    contents: tuple[FolderContents, ...] = ()  # by subset
    broken: Mapping[str, str] = field(default_factory=dict)  # path -> reason, of images that the run does without
    looks: Looks = field(default_factory=Looks)  # by path, of images that were decoded, now or earlier
    index: DataIndex = field(default_factory=DataIndex)
