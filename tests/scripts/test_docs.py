"""The documentation is that of the code: its option pages (DOCS_UPDATE=1 writes them anew), tables, flags, examples."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest

import fine_tune
import gen_img_diffusers
import sdxl_gen_img
import sdxl_minimal_inference
import sdxl_train
import sdxl_train_network
import train_db
import train_network
from finetune import merge_captions_to_metadata
from library.cli import caching, config_file, generation, metadata_tools, preparing, training
from library.cli.legacy import LegacyOptions
from library.cli.reference import options_page
from library.data import dataset_file
from library.generate.prompt_line import LINE_OPTIONS
from library.options import options_of
from library.train.optimizer_table import NAMES, TABLE
from library.train.options import COUNTS_IN, LR_SCHEDULERS
from library.train.preparing_options import PreparingOptions
from library.train.preview_options import PreviewOptions
from library.train.preview_prompts import PREVIEW_LINE_OPTIONS, read_previews
from networks.lora_settings import BLOCK_KEYS, LoRASettings
from tests.runs import ROOT
from tests.tools import all_tools
from tools import cache_latents, cache_text_encoder_outputs

SCRIPTS = {
    "train_network": train_network.SCRIPT, "sdxl_train_network": sdxl_train_network.SCRIPT,
    "train_db": train_db.SCRIPT, "fine_tune": fine_tune.SCRIPT, "sdxl_train": sdxl_train.SCRIPT,
}  # fmt: skip
GENERATORS = {"gen_img_diffusers": gen_img_diffusers.SCRIPT, "sdxl_gen_img": sdxl_gen_img.SCRIPT}


def options_of_script(name: str) -> str:
    script = (SCRIPTS | GENERATORS)[name]
    return options_page(f"{name}.py", script.groups(), script.defaults, omitted=script.omits)


PAGES = {
    **{name: partial(options_of_script, name) for name in SCRIPTS | GENERATORS},
    "caching_tools": lambda: options_page(
        "tools/cache_latents.py and tools/cache_text_encoder_outputs.py",
        caching.groups_that_count(),
        only=caching.names_that_count(),
    ),
    "sdxl_minimal_inference": lambda: options_page("sdxl_minimal_inference.py", [sdxl_minimal_inference.Options]),
    "prepare_buckets_latents": lambda: options_page(
        "finetune/prepare_buckets_latents.py", [PreparingOptions], {"max_resolution": "512,512"}
    ),
}
WRITTEN = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TRAINING, DATA = ROOT / "docs" / "train_network.md", ROOT / "docs" / "datasets.md"
WHOLE = ROOT / "docs" / "full_training.md"
OPTIONS = train_network.SCRIPT.options()
# flags of quickstart.py and of other people's programs
OF_OTHERS = {
    "--torch-index-url", "--logdir", "--num_processes", "--use_deepspeed", "--multi_gpu", "--num_machines",
    "--machine_rank", "--main_process_ip", "--main_process_port", "--use_fsdp", "--nproc_per_node",
    "--fsdp_version",
}  # fmt: skip
ENDINGS = {"\\\n": " ", "^\n": " "}


@pytest.mark.parametrize("name", PAGES)
def test_option_pages_are_current(name):
    path = ROOT / "docs" / f"{name}_options.md"
    if os.environ.get("DOCS_UPDATE"):
        path.write_text(PAGES[name](), encoding="utf-8")
    assert path.read_text(encoding="utf-8") == PAGES[name]()


# ---------------------------------------------------------------------------------------------- links


def anchors(page: Path) -> set[str]:
    """What "#..." may lead to, as GitHub makes it of headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_between_pages_lead_somewhere():
    for page in WRITTEN:
        for target, anchor in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", page.read_text(encoding="utf-8")):
            if "://" in target:
                continue
            file = page.parent / target if target else page
            assert file.exists(), f"{page.name}: {target}"
            assert not anchor or anchor in anchors(file), f"{page.name}: {target}#{anchor}"


def test_pictures_are_small_and_shown():
    shown = " ".join(page.read_text(encoding="utf-8") for page in WRITTEN)
    for picture in (ROOT / "docs" / "pictures").iterdir():
        assert f"pictures/{picture.name}" in shown
        assert picture.stat().st_size < (600_000 if picture.name == "quickstart.png" else 200_000)


# ---------------------------------------------------------------------------------------------- flags and tables


def known_flags() -> set[str]:
    tools = (
        merge_captions_to_metadata.TOOL.parser(),
        metadata_tools.clean_parser(None),
        caching.build_parser(cache_latents.TOOL),
        preparing.build_parser(None),
        sdxl_minimal_inference.build_parser(),
    )
    parsers = [
        *map(training.build_parser, SCRIPTS.values()),
        *map(generation.build_parser, GENERATORS.values()),
        *tools,
        *(tool.parser() for tool in all_tools().values()),
    ]
    in_prompts = {f"--{name}" for name in (*LINE_OPTIONS, *PREVIEW_LINE_OPTIONS)}
    return OF_OTHERS.union(in_prompts, *(parser._option_string_actions for parser in parsers))


def flags_in(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[A-Za-z][\w-]*", text))


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.name)
def test_every_flag_that_a_page_names_exists(page):
    assert flags_in(page.read_text(encoding="utf-8")) <= known_flags()


def test_every_flag_is_explained_outside_the_reference():
    explained = flags_in(TRAINING.read_text(encoding="utf-8") + DATA.read_text(encoding="utf-8"))
    assert {f"--{name}" for name in OPTIONS} - explained == set()
    whole = explained | flags_in(WHOLE.read_text(encoding="utf-8"))
    for name in ("train_db", "fine_tune"):
        assert {f"--{option}" for option in SCRIPTS[name].options()} - whole == set()
    sdxl = (ROOT / "docs" / "sdxl_train_network.md").read_text(encoding="utf-8")
    for name in ("sdxl_train_network", "sdxl_train"):
        options = {f"--{option}" for option in SCRIPTS[name].options()}
        assert options - whole - flags_in(sdxl) == set()
    assert {option.flag for option in options_of(LegacyOptions)} <= explained


def table_after(page: Path, heading: str) -> list[list[str]]:
    """The cells of the first table below a heading, without its head."""
    section = page.read_text(encoding="utf-8").partition(f"\n{heading}\n")[2]
    rows = re.search(r"(?:^\|.*\n)+", section, re.M)
    assert rows, heading
    return [
        [cell.strip().strip("`").replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in rows[0].splitlines()[2:]
    ]


def test_the_table_of_optimizers_is_that_of_the_code():
    rows = [tuple(row[:3]) for row in table_after(TRAINING, "## Optimizers")]
    assert rows == [(name, TABLE[name.lower()].path, TABLE[name.lower()].pip_name) for name in NAMES]


def test_the_table_of_schedules_is_that_of_the_code():
    rows = {row[0]: flags_in(row[2]) - {"--lr_scheduler_args"} for row in table_after(TRAINING, "## Schedules")}
    assert rows == {name: {f"--{o}" for o, where in COUNTS_IN.items() if name in where} for name in LR_SCHEDULERS}


def test_the_table_of_network_arguments_is_that_of_the_code():
    named = {name for row in table_after(TRAINING, "### networks.lora") for name in re.findall(r"\w+", row[0])}
    own = set(LoRASettings.__dataclass_fields__) - {"blocks"}
    assert named == own | set(BLOCK_KEYS)


def test_the_table_of_dataset_keys_is_that_of_the_code():
    rows = {key: "".join(cells[:3]) for key, *cells in table_after(DATA, "### Every key")}
    assert {key for key, where in rows.items() if where == "xx"} == dataset_file.DATASET_KEYS
    assert {key for key, where in rows.items() if where == "xxx"} == dataset_file.INHERITED_KEYS
    assert {key for key, where in rows.items() if where == "x"} == dataset_file.FOLDER_ONLY_KEYS
    assert rows.keys() == dataset_file.DATASET_KEYS | dataset_file.SUBSET_KEYS


# ---------------------------------------------------------------------------------------------- examples


class Block(NamedTuple):
    page: str
    language: str
    text: str


def blocks() -> Iterator[Block]:
    for page in WRITTEN:
        for language, text in re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S):
            yield Block(page.name, language, text)


def command_lines(program: str) -> list[tuple[str, str]]:
    """(page, what follows `program`) of every example that starts it, and of lines that are nothing but flags."""
    found = []
    for page, _, text in blocks():
        for ending, blank in ENDINGS.items():
            text = text.replace(ending, blank)
        for line in text.splitlines():
            if re.search(rf"{program}\s+--", line):
                found.append((page, line.partition(program)[2]))
            elif line.startswith("--") and program == "train_network.py" and page != "gen_img.md":
                found.append((page, line))
    return found


MINIMUM = "--pretrained_model_name_or_path m --output_dir o --network_module networks.lora"


@pytest.mark.parametrize(("page", "words"), command_lines("train_network.py"))
def test_examples_of_train_network_are_command_lines(page, words):
    words = re.sub(r"--config_file \S+", "", words).replace("--output_config", "")
    config, _ = training.parse(train_network.SCRIPT, shlex.split(f"{MINIMUM} {words}".replace("\\", "/")))
    assert config is not None
    config.check()


@pytest.mark.parametrize(
    ("script", "page", "words"), [(name, *line) for name in GENERATORS for line in command_lines(f"{name}.py")]
)
def test_examples_of_the_generators_are_command_lines(script, page, words):
    generation.build_parser(GENERATORS[script]).parse_strictly(shlex.split(words))


@pytest.mark.parametrize(("page", "words"), command_lines("tools/cache_latents.py"))
def test_examples_of_caching_latents_are_command_lines(page, words):
    words = words.replace("--config_file my_training.toml", "--pretrained_model_name_or_path m --train_data_dir d")
    config, _, _ = caching.parse(cache_latents.TOOL, shlex.split(words))
    assert config.cache.cache_latents_to_disk


@pytest.mark.parametrize(("page", "words"), command_lines("tools/cache_text_encoder_outputs.py"))
def test_examples_of_caching_text_are_command_lines(page, words):
    config, _, _ = caching.parse(cache_text_encoder_outputs.TOOL, shlex.split(words))
    assert config.text_cache.cache_text_encoder_outputs_to_disk


def test_the_example_of_preparing_is_a_command_line():
    (line,) = [text for page, _, text in blocks() if page == "caching.md" and "prepare_buckets" in text]
    preparing.build_parser(None).parse_strictly(shlex.split(line.replace("\\\n", " "))[2:])


@pytest.mark.parametrize("block", [block for block in blocks() if block.language == "toml"], ids=lambda b: b.page)
def test_examples_of_files_have_known_keys(block, tmp_path):
    file = tmp_path / "example.toml"
    file.write_text(block.text, encoding="utf-8")
    if "[[datasets]]" in block.text:
        assert dataset_file.read(file).datasets
    elif "[prompt]" in block.text:
        assert len(read_previews(PreviewOptions(sample_prompts=str(file)))) == 2
    else:
        values, notes = config_file.read_config_file(file, OPTIONS)
        assert values and not notes
