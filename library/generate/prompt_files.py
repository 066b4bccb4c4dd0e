"""Where prompts come from that are known before anything is drawn: text files, and pictures that have them written in.

A picture of this program or of a web user interface given to --from_file is made again: its size, seed, sampler and all
else that its text tells count, before the flags. Pictures to start from (--image_path) lend their prompts alone.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from library.generate.infotext import parse_infotext
from library.generate.picture_texts import picture_texts
from library.generate.prompt_line import PromptLine, RawLine, lines_of_text, read_bytes_as_text
from library.options import OptionError
from library.wording import counted

logger = logging.getLogger(__name__)

FROM_FILE, IMAGE_PATH = "--from_file", "--image_path"
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
INFOTEXT = re.compile(r"^Steps: \d+, .*\bSeed: \d+", re.MULTILINE)  # as web user interfaces save it beside pictures
WAY_OUT = "name one that this program or a web user interface made, or a text file of prompts"


def read_prompts(path: str | Path) -> Sequence[RawLine | PromptLine]:
    """The prompts of --from_file; raises OptionError for a file that is missing or holds none."""
    path = Path(path)
    if path.suffix.lower() in PICTURES:
        text = picture_texts(path, FROM_FILE).get("parameters")
        if text is None:
            raise OptionError(FROM_FILE, f"{path} does not tell how it was made", WAY_OUT)
        return [parse_infotext(text, str(path))]
    text = read_bytes_as_text(path, FROM_FILE)
    return [parse_infotext(text, str(path))] if INFOTEXT.search(text) else lines_of_text(text, path, FROM_FILE)


def prompts_of_pictures(paths: Sequence[str | Path]) -> list[PromptLine]:
    """The prompt and the negative prompt of each picture to start from; pictures without one are left out.

    Raises OptionError where none has a prompt.
    """
    read = [prompt_of_picture(path) for path in paths]
    lines = [replace(line, turn=turn) for turn, line in enumerate(read) if line is not None]
    if not lines:
        raise OptionError(IMAGE_PATH, f"no prompt given, and none in {counted(len(paths), 'picture')}", "add --prompt")
    return lines


def prompt_of_picture(path: str | Path) -> PromptLine | None:
    """What a picture tells of its prompts, None where it tells nothing."""
    texts = picture_texts(path, IMAGE_PATH)
    if "prompt" in texts:
        return PromptLine(texts["prompt"], texts.get("negative-prompt", ""), where=str(path))
    if "parameters" in texts:
        line = parse_infotext(texts["parameters"], str(path))
        return PromptLine(line.prompt, line.negative_prompt, where=str(path))
    logger.warning("%s: %s has no prompt in it and is left out", IMAGE_PATH, path)
    return None
