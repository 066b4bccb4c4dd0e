"""The pictures of docs/gen_img.md can be made again: each stands below its command, and the script knows it."""

from __future__ import annotations

import runpy

from tests.runs import ROOT

SCRIPT = ROOT / "docs" / "pictures" / "make_gen_img.py"


def test_each_picture_has_its_command_and_its_row():
    made = runpy.run_path(str(SCRIPT))
    commands = {name: text for text, name in made["BLOCK"].findall(made["PAGE"].read_text(encoding="utf-8"))}
    files = {path.stem.removeprefix("gen_img_") for path in SCRIPT.parent.glob("gen_img_*.webp")}
    assert commands.keys() == files
    assert made["FIGURES"].keys() == {name for name, text in commands.items() if "--grid" not in text}
    for text in commands.values():
        for command in text.replace("\\\n", " ").splitlines():
            assert command.startswith("python gen_img_diffusers.py --ckpt starter/model.safetensors ")
