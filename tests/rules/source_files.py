"""The repository's files as the rules see them: parsed Python, and which room of the house each file stands in."""

from __future__ import annotations

import ast
import functools
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NETWORK_TOOLS = frozenset(
    f"networks/{name}.py"
    for name in (
        "merge_lora", "merge_lora_old", "sdxl_merge_lora", "svd_merge_lora", "resize_lora", "extract_lora_from_models",
        "extract_lora_from_dylora", "check_lora_weights", "lora_interrogator",
    )
)  # fmt: skip
TOOL_FOLDERS = ("tools/", "finetune/", "starter/", "benchmarks/")


@dataclass(frozen=True)
class Import:
    """One import: the module's full name, where it stands, and whether it runs when the file is imported."""

    module: str
    line: int
    at_import: bool  # False inside functions and under `if TYPE_CHECKING:`


@dataclass
class SourceFile:
    """One Python file; `path` is relative to the repository, with forward slashes."""

    path: str
    text: str
    tree: ast.Module = field(init=False)

    def __post_init__(self) -> None:
        self.tree = ast.parse(self.text, self.path)

    @property
    def module(self) -> str:
        return self.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")

    @property
    def room(self) -> str:
        """The package for library files ("library.data"), the whole name for files directly in library."""
        parts = self.module.split(".")
        return ".".join(parts[:2]) if parts[0] == "library" else parts[0]

    @property
    def is_entry_script(self) -> bool:
        return "/" not in self.path and self.path != "quickstart.py"

    @property
    def is_tool(self) -> bool:
        return self.path == "quickstart.py" or self.path.startswith(TOOL_FOLDERS) or self.path in NETWORK_TOOLS

    @property
    def is_test(self) -> bool:
        return self.path.startswith("tests/")

    def functions(self) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
        for node in ast.walk(self.tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield node

    @functools.cached_property
    def imports(self) -> list[Import]:
        """Every import; `from a.b import c` counts as a.b.c, which names the module where c is one."""
        found: list[Import] = []
        _collect_imports(self.tree, True, found)
        return found


def _collect_imports(node: ast.AST, at_import: bool, found: list[Import]) -> None:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            found += [Import(name.name, child.lineno, at_import) for name in child.names]
        elif isinstance(child, ast.ImportFrom):
            found += [Import(f"{child.module}.{name.name}", child.lineno, at_import) for name in child.names]
        elif isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) or _is_type_checking(child):
            _collect_imports(child, False, found)
        else:
            _collect_imports(child, at_import, found)


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def repository_paths() -> list[Path]:
    """Tracked files and new ones that git does not ignore."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
    return [path for path in (ROOT / name for name in sorted(filter(None, names))) if path.is_file()]


@functools.cache
def repository_sources() -> tuple[SourceFile, ...]:
    return tuple(
        SourceFile(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8"))
        for path in repository_paths()
        if path.suffix == ".py"
    )
