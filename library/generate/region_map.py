"""Which requests are drawn by regions, and what is asked of them. Importing this brings no torch.

Regional use: the prompt has parts, joined by AND, and each network belongs to one of them; a picture says where.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from library.generate.config import GenerationConfig
from library.generate.request import GenerationRequest
from library.options import OptionError, require
from library.wording import counted

FLAG = "--mask_path"
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def region_map(config: GenerationConfig) -> Path | None:
    """The picture that says where networks work: the first mask, where networks are applied; else None.

    Raises OptionError for a mask that is not there or no picture, and for networks that can't work by regions.
    """
    networks, mask = config.networks, config.start.mask_path
    if mask is None or not networks.applied:
        return None
    require(
        not networks.network_pre_calc,
        "--network_pre_calc",
        f"weights that are calculated beforehand know no regions ({FLAG})",
        "leave one of both out",
    )
    path = first_picture(Path(mask))
    from PIL import Image  # here: command lines import this file

    try:
        with Image.open(path) as image:
            image.verify()
    except Exception as error:  # Pillow's decoders raise what they like
        raise OptionError(FLAG, f"{path} is no picture that can be read ({error})", "save it again as PNG") from None
    return path


def first_picture(path: Path) -> Path:
    """The file, or the first picture of the folder in order of names."""
    require(path.exists(), FLAG, f"{path} does not exist", "check the path")
    if not path.is_dir():
        return path
    found = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
    require(bool(found), FLAG, f"the folder {path} holds no picture", "put one in, or name the picture itself")
    return found[0]


def in_regions(request: GenerationRequest, path: Path, config: GenerationConfig) -> GenerationRequest:
    """The request, drawn by the region map; OptionError for a prompt with fewer parts than there are networks."""
    regional = replace(
        request, region_map=str(path), region_colors=config.networks.network_regional_mask_max_color_codes or None
    )
    num_networks, num_parts = len(config.networks.applied), len(regional.part_texts)
    if num_networks > num_parts:
        prompt = json.dumps(request.prompt, ensure_ascii=False)
        problem = f"{counted(num_networks, 'network')} for {counted(num_parts, 'part')} of the prompt {prompt}"
        raise OptionError("--network_weights", problem, 'with --mask_path write a part for each, joined by " AND "')
    return regional
