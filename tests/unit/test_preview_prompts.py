"""Files of prompts for previews: three formats, every inline option, and one sentence for what is broken."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from library.generate.prompt_line import PromptLine
from library.options import OptionError
from library.train.preview_options import PreviewOptions
from library.train.preview_prompts import read_previews


def read(path: Path, content: str, sampler: str = "ddim") -> list[PromptLine]:
    path.write_text(content, encoding="utf-8")
    lines = read_previews(PreviewOptions(sample_at_first=True, sample_prompts=str(path), sample_sampler=sampler))
    return [replace(line, where="") for line in lines]


FULL = PromptLine("a cat", "a dog", 640, 448, 20, 5.5, (42,), "", "euler_a")


def test_the_three_formats_say_the_same(tmp_path):
    inline = "a cat --w 640 --h 448 --d 42 --s 20 --l 5.5 --n a dog --ss euler_a"
    table = {
        "prompt": "a cat", "negative_prompt": "a dog", "width": 640, "height": 448, "sample_steps": 20, "scale": 5.5,
        "seed": 42, "sample_sampler": "euler_a",
    }  # fmt: skip
    toml = "[prompt]\n[[prompt.subset]]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in table.items())
    assert read(tmp_path / "p.txt", inline) == [FULL]
    assert read(tmp_path / "p.json", json.dumps([inline, table])) == [FULL, FULL]
    assert read(tmp_path / "p.toml", toml) == [FULL]


def test_a_prompt_that_looks_like_an_option_is_a_prompt(tmp_path):
    """Trap 41: the first piece of a line was matched against the options, and comments were found before stripping."""
    assert read(tmp_path / "p.txt", "s 20 men in a boat --s 5\n  # a comment\n\nh 1\n") == [
        PromptLine("s 20 men in a boat", steps=5, where=""),
        PromptLine("h 1", where=""),
    ]


def test_a_subset_overrides_what_is_said_for_all(tmp_path):
    """Trap 40: the same key in both was an error."""
    content = (
        '[prompt]\nnegative_prompt = "bad"\nwidth = 128\n[[prompt.subset]]\nprompt = "a"\n'
        '[[prompt.subset]]\nprompt = "b"\nwidth = 256\nnegative_prompt = "worse"\n'
    )
    assert read(tmp_path / "p.toml", content) == [
        PromptLine("a", "bad", 128, where=""),
        PromptLine("b", "worse", 256, where=""),
    ]
    assert read(tmp_path / "p.toml", '[prompt]\nprompt = "alone"\n') == [PromptLine("alone", where="")]


def test_sizes_and_steps_are_made_to_fit(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        lines = read(tmp_path / "p.txt", "a --w 515 --h 7\nb --s 0\nc --s 5000\nd --s 2 --ss pndm")
    assert [(line.width, line.height) for line in lines][:2] == [(512, 64), (None, None)]
    assert [line.steps for line in lines] == [None, 1, 999, 4]
    assert len(caplog.messages) == 4 and "515 x 7 is drawn as 512 x 64" in caplog.text


def test_options_of_other_models_are_named(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        assert read(tmp_path / "p.txt", "a --g 3.5 --cn pose.png") == [PromptLine("a", where="")]
        assert read(tmp_path / "p.json", '[{"prompt": "a", "guidance_scale": 3, "controlnet_image": "pose.png"}]') == [
            PromptLine("a", where="")
        ]
    assert "no effect: --g 3.5, --cn pose.png" in caplog.text
    assert "guidance_scale has no effect" in caplog.text and "controlnet_image has no effect" in caplog.text


@dataclass(frozen=True)
class Broken:
    name: str
    content: str | bytes
    message: str


BROKEN = [
    Broken("p.csv", "a", r"--sample_prompts: .*p\.csv is neither \.txt nor \.toml nor \.json"),
    Broken("p.txt", "\n# only this\n", "--sample_prompts: .*holds no prompt"),
    Broken("p.txt", b"fine\n\xff\xfe", r"p.txt, line 2: is not UTF-8 text"),
    Broken("p.txt", "a\nb --w wide", r"p\.txt, line 2: --w 'wide' is not a whole number"),
    Broken("p.txt", "a --ss eular", r"p\.txt, line 1: sampler: 'eular' is not one of .*did you mean euler\?"),
    Broken("p.txt", "a --d -1", r"p\.txt, line 1: --d: -1 is out of range; .*leave it out for a random seed"),
    Broken("p.toml", "[prompt]\nwidth = \n", r"p\.toml: line 2 is not TOML"),
    Broken("p.toml", "[promt]\n", r"p\.toml: promt: unknown key; prompts stand in \[prompt\]"),
    Broken("p.toml", "prompt = 'a'", r"p\.toml: prompt: is not a table; write \[prompt\]"),
    Broken("p.toml", "[prompt]\n", r"--sample_prompts: .* holds no prompt"),
    Broken("p.toml", "[prompt]\nsubset = ['a']\n", r"prompt\.subset\[0\]: 'a' is not a table"),
    Broken("p.toml", "[[prompt.subset]]\nwidth = 64", r"prompt\.subset\[0\]: no prompt given"),
    Broken("p.toml", "[[prompt.subset]]\nprompt = 'a'\nwitdh = 64", r"subset\[0\]\.witdh: unknown key; did you mean w"),
    Broken("p.toml", "[[prompt.subset]]\nprompt = 'a'\nwidth = 'x'", r"subset\[0\]\.width: 'x' is not a whole number"),
    Broken("p.json", '["a",\n', r"p\.json: line \d is not JSON"),
    Broken("p.json", '{"prompt": "a"}', r"p\.json: is not a list"),
    Broken("p.json", "[5]", r"p\.json: \[0\]: 5 is neither a text nor an object"),
    Broken("p.json", '["a --s many"]', r"p\.json: \[0\]: --s 'many' is not a whole number"),
]


@pytest.mark.parametrize("broken", BROKEN, ids=[f"{item.name} {item.content!r}"[:40] for item in BROKEN])
def test_broken_files_name_the_place(tmp_path, broken):
    path = tmp_path / broken.name
    path.write_bytes(broken.content if isinstance(broken.content, bytes) else broken.content.encode())
    with pytest.raises(OptionError) as caught:
        read_previews(PreviewOptions(sample_at_first=True, sample_prompts=str(path)))
    assert re.search(broken.message, str(caught.value)), caught.value


def test_a_missing_file(tmp_path):
    for name in ("p.txt", "p.toml", "p.json"):
        with pytest.raises(OptionError, match="--sample_prompts.*(No such file|does not exist)"):
            read_previews(PreviewOptions(sample_at_first=True, sample_prompts=str(tmp_path / name)))


# ---------------------------------------------------------------------------------------------- when


@pytest.mark.parametrize(
    ("options", "steps", "epochs"),
    [
        ({"sample_every_n_steps": 2}, [2, 4], []),
        ({"sample_every_n_epochs": 2}, [], [2, 4]),
        ({"sample_every_n_steps": 2, "sample_every_n_epochs": 3}, [], [3]),
        ({"sample_every_n_steps": 2, "sample_every_n_epochs": 0}, [2, 4], []),
        ({"sample_every_n_steps": -1, "sample_at_first": True}, [], []),
    ],
)
def test_when_previews_are_due(options, steps, epochs):
    group = PreviewOptions(**options, sample_prompts="p.txt")
    assert [step for step in range(1, 5) if group.due_after_step(step)] == steps
    assert [epoch for epoch in range(1, 5) if group.due_after_epoch(epoch)] == epochs


@pytest.mark.parametrize("name", ["sample_every_n_steps", "sample_every_n_epochs", "sample_at_first"])
def test_previews_without_prompts_are_refused(name):
    with pytest.raises(OptionError, match=f"--{name}: nothing says what .*; name a file of prompts with --sample_pro"):
        PreviewOptions(**{name: 1})


@pytest.mark.parametrize(
    ("options", "note"),
    [
        ({"sample_every_n_steps": 0}, "--sample_every_n_steps 0 draws no previews"),
        ({"sample_every_n_epochs": -3}, "--sample_every_n_epochs -3 draws no previews"),
        (
            {"sample_every_n_steps": 5, "sample_every_n_epochs": 1, "sample_prompts": "p.txt"},
            "--sample_every_n_steps has no effect beside --sample_every_n_epochs",
        ),
        ({"sample_prompts": "p.txt"}, "--sample_prompts has no effect: neither steps nor epochs between previews"),
        ({"sample_sampler": "euler"}, "--sample_sampler has no effect: there are no previews"),
    ],
)
def test_what_has_no_effect_is_said(options, note):
    (said,) = PreviewOptions(**options).notes()
    assert said.startswith(note)


def test_settings_that_all_count_are_silent():
    assert PreviewOptions(sample_every_n_steps=5, sample_prompts="p.txt", sample_sampler="euler").notes() == []
    assert PreviewOptions().notes() == []


def test_braces_are_said_to_stay(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("a {red|blue} cat")
    (line,) = read_previews(PreviewOptions(sample_every_n_steps=1, sample_prompts=str(path)))
    assert line.prompt == "a {red|blue} cat"
    assert "as it stands" in caplog.text
