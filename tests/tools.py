"""The commands of the project that are no trainers and no generators."""

import importlib

from library.cli.tools import Tool
from tests.rules.source_files import repository_sources


def all_tools() -> dict[str, Tool]:
    """Module name, such as "networks.resize_lora" -> its tool."""
    return {
        file.module: importlib.import_module(file.module).TOOL
        for file in repository_sources()
        if file.path.startswith(("tools/", "networks/")) and "TOOL = Tool(" in file.text
        and "library.cli.tools import Tool" in file.text
    }  # fmt: skip
