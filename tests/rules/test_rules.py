"""Every rule holds for the repository, and every rule finds the breach it is there for."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.rules import import_rules, shape_rules
from tests.rules.source_files import ROOT, SourceFile, repository_paths, repository_sources

RULES = (
    import_rules.imports_point_downwards,
    import_rules.library_never_names_networks,
    import_rules.nobody_imports_entry_scripts,
    import_rules.only_command_lines_import_argparse,
    import_rules.command_lines_start_without_torch,
    import_rules.importing_changes_nothing,
    import_rules.nothing_below_scripts_prints,
    shape_rules.files_are_short,
    shape_rules.functions_are_short,
    shape_rules.functions_take_few_parameters,
    shape_rules.blocks_nest_little,
    shape_rules.namespaces_stay_in_the_command_line,
)
LONG_FUNCTION = "def long():\n" + "    x = 1\n" * 100
DEEP = "def deep(x):\n" + "".join(f"{'    ' * (i + 1)}if x > {i}:\n" for i in range(5)) + "    " * 6 + "pass\n"
ELIF_CHAIN = "def flat(x):\n    if x == 0:\n        pass\n" + "".join(
    f"    elif x == {i}:\n        pass\n" for i in range(9)
)

# (rule, files that break it by path, files that keep it)
EXAMPLES = [
    ("imports_point_downwards", {"library/data/a.py": "from library.models import vae"},
     {"library/data/a.py": "from library.text.tokens import ClipTokenizer\nfrom library.options import opt"}),
    ("imports_point_downwards", {"library/families/sd.py": "def f():\n    import library.train.loop"},
     {"library/train/session.py": "import library.families.sd"}),
    ("imports_point_downwards", {"networks/lora.py": "from library.train import loop"},
     {"networks/lora.py": "from library.checkpoints import safetensors_io"}),
    ("library_never_names_networks", {"library/targets/a.py": "import networks.lora"},
     {"library/targets/a.py": "import importlib\nimportlib.import_module(name)"}),
    ("library_never_names_networks", {"library/cli/a.py": "import importlib\nimportlib.import_module('networks.lora')"},
     {"tools/a.py": "import networks.lora"}),
    ("nobody_imports_entry_scripts", {"train_network.py": "", "gen_img.py": "import train_network"},
     {"train_network.py": "from library.cli import training"}),
    ("nobody_imports_entry_scripts", {"train_network.py": "", "tools/a.py": "from train_network import main"},
     {"train_network.py": "", "tools/a.py": "from networks import lora"}),
    ("only_command_lines_import_argparse", {"library/data/a.py": "from argparse import Namespace"},
     {"library/options.py": "import argparse", "tools/a.py": "import argparse"}),
    ("command_lines_start_without_torch", {"library/data/options.py": "import numpy as np"},
     {"library/data/options.py": "def f():\n    import numpy"}),
    ("command_lines_start_without_torch",
     {"t.py": "import library.cli.a", "library/cli/a.py": "from library.b import c", "library/b.py": "import torch"},
     {"library/cli/a.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch"}),
    ("importing_changes_nothing", {"library/a.py": "import os\nDEBUG = os.environ.get('DEBUG')"},
     {"library/a.py": "import os\ndef debug():\n    return os.environ.get('DEBUG')"}),
    ("importing_changes_nothing", {"library/a.py": "import torch\nCUDA = torch.cuda.is_available()"},
     {"library/a.py": "import torch\n@torch.no_grad()\ndef f():\n    torch.cuda.empty_cache()"}),
    ("importing_changes_nothing", {"networks/a.py": "import diffusers\ndiffusers.UNet.forward = None"},
     {"networks/a.py": "class A:\n    pass\nA.name = 'a'"}),
    ("nothing_below_scripts_prints", {"library/a.py": "print(1)"},
     {"train.py": "print(1)", "networks/merge_lora.py": "print(1)"}),
    ("files_are_short", {"library/a.py": "x = 1\n" * 401}, {"library/a.py": "x = 1\n" * 400}),
    ("files_are_short", {"library/train/loop.py": "x = 1\n" * 121}, {"library/train/loop.py": "x = 1\n" * 120}),
    ("functions_are_short", {"library/a.py": LONG_FUNCTION},
     {"library/a.py": LONG_FUNCTION.replace("    x = 1\n", "", 1)}),
    ("functions_take_few_parameters", {"library/a.py": "def f(a, b, c, d, *, e, f, g, h, i): ..."},
     {"library/a.py": "class A:\n    def f(self, a, b, c, d, *, e, f, g, h): ..."}),
    ("blocks_nest_little", {"library/a.py": DEEP}, {"library/a.py": ELIF_CHAIN}),
    ("namespaces_stay_in_the_command_line", {"library/train/a.py": "def f(args): ..."},
     {"library/cli/a.py": "def f(args): ...", "library/train/a.py": "def f(*args): ..."}),
]  # fmt: skip


def sources(texts: dict[str, str]) -> list[SourceFile]:
    return [SourceFile(path, text) for path, text in texts.items()]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_repository_keeps(rule):
    breaches = rule(repository_sources())
    assert not breaches, "\n" + "\n".join(breaches)


@pytest.mark.parametrize(("name", "wrong", "right"), EXAMPLES)
def test_the_rule_finds_its_breach(name, wrong, right):
    rule = next(rule for rule in RULES if rule.__name__ == name)
    assert rule(sources(wrong))
    assert not rule(sources(right))


def test_every_rule_has_an_example():
    assert {rule.__name__ for rule in RULES} == {name for name, _, _ in EXAMPLES}


def test_no_file_names_a_machine():
    texts = {}
    for path in repository_paths():
        content = path.read_bytes()
        if b"\0" not in content[:8192]:
            texts[path.relative_to(ROOT).as_posix()] = content.decode("utf-8", errors="replace")
    breaches = shape_rules.texts_name_no_machine(texts, ROOT)
    assert not breaches, "\n" + "\n".join(breaches)


CHECKOUT = Path("/srv") / "ann" / "checkouts" / "project"


@pytest.mark.parametrize(
    "line", ["see /" + "home/ann/models", "C:" + r"\Users\ann\models", "/" + "Users/ann/x", f"{CHECKOUT.parent}/file"]
)
def test_machine_paths_are_found(line):
    assert shape_rules.texts_name_no_machine({"a.md": line}, CHECKOUT)
    assert not shape_rules.texts_name_no_machine({"a.md": "models/home/ann.safetensors"}, CHECKOUT)
