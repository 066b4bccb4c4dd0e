"""Draw the edges of a picture, as ControlNets take them (Canny 1986). See docs/models_and_loras.md."""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass
from pathlib import Path

if __package__ in (None, ""):  # started as a file: the repository's folder is where library is
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.cli.output_places import output_file
from library.cli.tools import Tool
from library.options import OptionError, opt, require

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CannyOptions:
    """What is drawn. Thresholds are of the gradient: weak edges count where they touch strong ones."""

    input: str = opt("", help="picture to read")
    output: str = opt("", help="picture to write: white edges on black, in the format of its extension")
    thres1: int = opt(32, help="threshold of weak edges")
    thres2: int = opt(224, help="threshold of strong edges")

    def __post_init__(self) -> None:
        for name in ("thres1", "thres2"):
            require(getattr(self, name) >= 0, f"--{name}", f"{getattr(self, name)} is negative", "use 0 or more")


def draw_edges(options: CannyOptions) -> None:
    """Raises OptionError for a picture that can't be read, and for a place where none can be written."""
    output = output_file(options.output, "--output", {"the picture that is read": [options.input]})
    import cv2

    from library.checkpoints.safetensors_io import atomic_file
    from library.data.headers import BadImage
    from library.data.images import upright_picture

    extension = output.suffix.lower()
    if not extension or not cv2.haveImageWriter(extension):
        raise OptionError("--output", f"{output.name} has no extension of a picture", "use .png")
    path = str(Path(options.input).expanduser())
    try:
        picture = upright_picture(path)
    except BadImage as error:
        raise OptionError("--input", f"{path} can't be read ({error})", "name a picture") from None
    edges_HW = cv2.Canny(cv2.cvtColor(picture.rgb_HWC, cv2.COLOR_RGB2GRAY), options.thres1, options.thres2)
    data = cv2.imencode(extension, edges_HW)[1].tobytes()
    with atomic_file(output, len(data)) as file:
        file.write(data)
    height, width = edges_HW.shape
    logger.info("%s: %dx%d, %.1f%% of the pixels are edges", output, width, height, 100 * (edges_HW > 0).mean())


TOOL = Tool(__doc__, CannyOptions, draw_edges, required=("input", "output"))

if __name__ == "__main__":
    sys.exit(TOOL.run())
