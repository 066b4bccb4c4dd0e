"""Every flag of train_network.py changes what it should: two short runs, without and with it, side by side.

A flag has a row in ROWS (tests/flag_rows.py), or, where a run on the tiny model can't show it, the name of the test
that does in ELSEWHERE.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import train_network as entry
from library.cli.training import build_parser
from tests.flag_effects import Outcome, watching
from tests.flag_rows import ELSEWHERE, ROWS
from tests.runs import ROOT, train_network
from tests.tiny_data import tiny_image, tiny_images
from tests.tiny_models import tiny_sd_checkpoint

TAGS = ["one, two, three, four", "five, six, seven, eight"]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory, tiny_sd1_path: Path) -> dict[str, Path]:
    """Models, networks and folders of images by name."""
    root = tmp_path_factory.mktemp("flags")
    here = {
        name: root / name
        for name in ("data", "others", "reg", "broken", "transparent", "wide", "faces", "masks", "disk")
    }
    here |= {"root": root, "model": tiny_sd1_path, "other": tiny_sd_checkpoint(root / "other.safetensors", seed=7)}
    square = [(64, 64)]
    for name, seed in (("data", 0), ("others", 20), ("disk", 0)):
        tiny_images(here[name] / "1_disc", 4, square, TAGS, seed=seed)
    tiny_images(here["reg"] / "1_thing", 2, square, [], seed=40)
    tiny_images(here["wide"] / "1_disc", 4, [(112, 64), (200, 90)], TAGS)
    tiny_images(here["broken"] / "1_disc", 4, square, TAGS)
    (here["broken"] / "1_disc" / "broken.png").write_bytes(b"no picture")
    for folder, text in (
        (".tags", "quite other tags"),
        (".wild", "{{a|b|c|d|e|f|g|h}}"),
        (".weighted", "(one:1.9), two"),
    ):
        for image in (here["data"] / "1_disc").glob("image*.txt"):
            image.with_suffix(folder).write_text(text.replace("{{", "{").replace("}}", "}"), encoding="utf-8")
    for index in range(4):
        picture = tiny_image((64, 64), seed=index)
        alpha = Image.linear_gradient("L").resize((64, 64)).rotate(90 * index)
        for folder in ("transparent", "masks", "faces"):
            (here[folder] / "1_disc").mkdir(parents=True, exist_ok=True)
        picture.putalpha(alpha)
        picture.save(here["transparent"] / "1_disc" / f"image_{index:03d}.png")
        alpha.save(here["masks"] / f"image_{index:03d}.png")
        tiny_image((160, 120), seed=index).save(here["faces"] / "1_disc" / f"image{index}_70_60_50_50.png")
    entries = {f"image_{index:03d}": {"caption": "one", "tags": "two, three"} for index in range(4)}
    (root / "meta.json").write_text(json.dumps(entries), encoding="utf-8")
    (root / "data.toml").write_text(
        "[[datasets]]\nresolution = 64\nbatch_size = 1\n"
        f"[[datasets.subsets]]\nimage_dir = '{here['others'] / '1_disc'}'\n",
        encoding="utf-8",
    )
    (root / "prompts.txt").write_text("a disc --w 64 --h 64 --s 2 --d 1\n", encoding="utf-8")
    return here


def with_places(value: Any, places: Mapping[str, Any]) -> Any:
    if isinstance(value, list):
        return [with_places(item, places) for item in value]
    return value.format(**places) if isinstance(value, str) and "{" in value else value


@pytest.fixture(scope="module")
def outcome_of(places: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Outcome]:
    """A short run with these settings; equal settings run once."""
    done: dict[str, Outcome] = {}
    networks: dict[str, str] = {}

    def network(name: str, **settings: Any) -> str:
        if name not in networks:
            networks[name] = str(outcome(learning_rate=1e-1, **settings).file)
        return networks[name]

    def outcome(**settings: Any) -> Outcome:
        key = repr(sorted(settings.items(), key=lambda item: item[0]))
        if key not in done:
            folder = tmp_path_factory.mktemp("run")
            if "{network" in key:
                places["network"], places["network3"] = network("4"), network("3", network_dim=3)
            done[key] = run(folder, settings)
        return done[key]

    def run(folder: Path, settings: Mapping[str, Any]) -> Outcome:
        base = {
            "pretrained_model_name_or_path": "{model}", "train_data_dir": "{data}", "output_dir": "{out}",
            "output_name": "net", "network_module": "networks.lora", "network_dim": 4, "resolution": "64",
            "train_batch_size": 2, "max_train_steps": 2, "learning_rate": 1e-3, "seed": 1,
            "max_data_loader_n_workers": 0,
        }  # fmt: skip
        names = {**places, "out": folder}
        options = {name: with_places(value, names) for name, value in {**base, **settings}.items()}
        console = io.StringIO()
        handler = logging.StreamHandler(console)
        logging.getLogger().addHandler(handler)
        try:
            with contextlib.redirect_stderr(console), contextlib.redirect_stdout(console), watching() as inside:
                code = train_network(**options)
        finally:
            logging.getLogger().removeHandler(handler)
        return Outcome(code, folder, console.getvalue(), inside)

    return outcome


@pytest.mark.parametrize("flag", ROWS)
def test_the_flag_changes_what_it_should(flag, outcome_of):
    row = ROWS[flag]
    without = outcome_of(**row.beside)
    row.shows(without, outcome_of(**{**row.beside, **row.also, flag: row.value}))
    if flag != "sdpa":  # the one that names a default
        with pytest.raises(AssertionError):  # of a flag that does nothing
            row.shows(without, without)


def test_every_flag_has_its_test():
    """Each flag of the parser is in one of the tables, and each test named in ELSEWHERE is there and names its flag.

    Those are tests that run everywhere: what only a GPU shows is in tests/gpu besides.
    """
    flags = {
        word.removeprefix("--") for action in build_parser(entry.SCRIPT)._actions for word in action.option_strings
    }
    assert flags - {"-h", "help"} == set(ROWS) | set(ELSEWHERE)
    assert not set(ROWS) & set(ELSEWHERE)
    for flag, test in ELSEWHERE.items():
        assert not test.startswith("tests/gpu")
        path, _, name = test.partition("::")
        source = (ROOT / path).read_text(encoding="utf-8")
        assert f"def {name}(" in source and flag in source, test
