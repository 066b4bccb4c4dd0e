"""Sizes, and what must not stand in any file. Each rule takes files and returns one sentence per breach."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.rules.source_files import SourceFile

FILE_LINES = 400
LOOP_LINES = 120  # library/train/loop.py: what does not fit here belongs to a family or a target
FUNCTION_LINES = 100
PARAMETERS = 8
NESTING = 4

BLOCKS = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.With, ast.AsyncWith, ast.Try, ast.Match)
PRIVATE_FOLDERS = r"(?<![\w.])/(?:home|Users|root)/\w|\b[A-Za-z]:\\Users\\\w"


def files_are_short(files: Sequence[SourceFile]) -> list[str]:
    breaches = []
    for file in files:
        limit = LOOP_LINES if file.path == "library/train/loop.py" else FILE_LINES
        lines = len(file.text.splitlines())
        if lines > limit:
            breaches.append(f"{file.path} has {lines} lines ({limit} allowed)")
    return breaches


def functions_are_short(files: Sequence[SourceFile]) -> list[str]:
    return [
        f"{file.path}:{function.lineno} {function.name} has {lines} lines ({FUNCTION_LINES} allowed)"
        for file in files
        for function in file.functions()
        if (lines := (function.end_lineno or function.lineno) - function.lineno + 1) > FUNCTION_LINES
    ]


def functions_take_few_parameters(files: Sequence[SourceFile]) -> list[str]:
    return [
        f"{file.path}:{function.lineno} {function.name} takes {len(names)} parameters ({PARAMETERS} allowed)"
        for file in files
        for function in file.functions()
        if len(names := parameter_names(function)) > PARAMETERS
    ]


def parameter_names(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """Without self and cls; *values and **values count as one each."""
    arguments = function.args
    plain = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    gathered = [argument.arg for argument in (arguments.vararg, arguments.kwarg) if argument is not None]
    return [name for name in plain + gathered if name not in ("self", "cls")]


def blocks_nest_little(files: Sequence[SourceFile]) -> list[str]:
    return [
        f"{file.path}:{function.lineno} {function.name} nests {depth} blocks ({NESTING} allowed)"
        for file in files
        for function in file.functions()
        if (depth := nesting(function.body)) > NESTING
    ]


def nesting(body: Sequence[ast.stmt]) -> int:
    """Blocks inside each other; `elif` is no deeper than its `if`, and a function inside a function starts anew."""
    deepest = 0
    for statement in body:
        if isinstance(statement, BLOCKS):
            deepest = max(deepest, 1 + max(nesting(part) for part in _parts(statement)))
    return deepest


def _parts(block: ast.stmt) -> list[list[ast.stmt]]:
    parts = [block.body] if hasattr(block, "body") else []
    otherwise = getattr(block, "orelse", [])
    is_elif = isinstance(block, ast.If) and len(otherwise) == 1 and isinstance(otherwise[0], ast.If)
    parts += _parts(otherwise[0]) if is_elif else [otherwise]
    parts += [handler.body for handler in getattr(block, "handlers", [])]
    parts += [case.body for case in getattr(block, "cases", [])]
    return [*parts, getattr(block, "finalbody", [])]


def namespaces_stay_in_the_command_line(files: Sequence[SourceFile]) -> list[str]:
    """No function below library.cli takes the whole command line; `*args` is something else."""
    return [
        f"{file.path}:{function.lineno} {function.name} takes `args`; pass the option group it needs"
        for file in files
        if file.path.startswith("library/") and not file.path.startswith("library/cli/")
        for function in file.functions()
        if "args" in [argument.arg for argument in (*function.args.args, *function.args.kwonlyargs)]
    ]


def texts_name_no_machine(texts: Mapping[str, str], own_folder: Path) -> list[str]:
    """No file names somebody's home folder, or the folder in which this checkout happens to stand."""
    patterns = [PRIVATE_FOLDERS]
    if own_folder.parent not in (Path(own_folder.anchor), Path("/tmp")):
        patterns.append(re.escape(str(own_folder.parent)) + r"[/\\]")
    pattern = re.compile("|".join(patterns))
    return [
        f"{path}:{number} names {match.group()!r}"
        for path, text in texts.items()
        for number, line in enumerate(text.splitlines(), 1)
        if (match := pattern.search(line))
    ]
