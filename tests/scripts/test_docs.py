"""The option pages of the documentation are those of the code. DOCS_UPDATE=1 writes them anew."""

from __future__ import annotations

import os
import re

import pytest

import sdxl_train_network
import train_network
from library.cli.reference import options_page
from library.generate.options import CONFIG_GROUPS
from tests.runs import ROOT

PAGES = {
    "train_network": lambda: options_page(
        "train_network.py", train_network.SCRIPT.groups(), train_network.SCRIPT.defaults
    ),
    "sdxl_train_network": lambda: options_page(
        "sdxl_train_network.py", sdxl_train_network.SCRIPT.groups(), sdxl_train_network.SCRIPT.defaults
    ),
    "gen_img_diffusers": lambda: options_page("gen_img_diffusers.py", CONFIG_GROUPS.values()),
}


@pytest.mark.parametrize("name", PAGES)
def test_option_pages_are_current(name):
    path = ROOT / "docs" / f"{name}_options.md"
    if os.environ.get("DOCS_UPDATE"):
        path.write_text(PAGES[name](), encoding="utf-8")
    assert path.read_text(encoding="utf-8") == PAGES[name]()


def test_links_between_pages_lead_somewhere():
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"
