"""Who may know whom. Each rule takes source files and returns one sentence per breach."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence

from tests.rules.source_files import SourceFile

# A room may import itself, what stands here beside it, and what every room may import.
EVERYWHERE = ("library.options", "library.packages", "library.progress", "library.randomness", "library.wording")
FOUNDATION = ("library.models", "library.text", "library.checkpoints")
BELOW = {
    "library.cli": ("library",),
    "library.train": (
        "library.targets", "library.families", "library.data", "library.generate", "library.diffusion", *FOUNDATION,
    ),
    "library.targets": ("library.families", "library.data.batch", *FOUNDATION),
    "library.generate": (
        "library.families", "library.diffusion", "library.data.headers", "library.data.images", *FOUNDATION,
    ),
    "library.families": FOUNDATION,
    "library.data": ("library.text",),
    "library.diffusion": ("library.data.batch", *FOUNDATION),
    "library.models": ("library.text", "library.checkpoints"),
    "library.text": ("library.checkpoints",),
    "library.checkpoints": (),
    "library.options": (),
    "library.packages": (),
    "library.progress": (),
    "library.randomness": (),
    "library.wording": (),
    "networks": ("library.checkpoints", "library.models"),
}  # fmt: skip
HEAVY = ("torch", "numpy", "diffusers", "transformers", "accelerate", "safetensors", "cv2", "PIL", "tensorboard")
ENVIRONMENT = ("os.environ", "os.getenv", "os.putenv")
DEVICE_CALLS = ("torch.cuda", "torch.mps", "torch.xpu", "torch.set_", "torch.manual_seed", "torch.use_deterministic")


def within(module: str, packages: Sequence[str]) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


def imports_point_downwards(files: Sequence[SourceFile]) -> list[str]:
    """Library rooms and networks import only what BELOW allows them."""
    breaches = []
    for file in files:
        if not within(file.module, ("library", "networks")) or file.is_tool:
            continue
        allowed = (file.room, *EVERYWHERE, *BELOW.get(file.room, ()))
        for item in file.imports:
            if within(item.module, ("library", "networks")) and not within(item.module, allowed):
                breaches.append(f"{file.path}:{item.line} {file.room} imports {item.module}")
    return breaches


def library_never_names_networks(files: Sequence[SourceFile]) -> list[str]:
    """The user names a network module; importlib loads it."""
    breaches = []
    for file in files:
        if file.room.partition(".")[0] != "library":
            continue
        breaches += [
            f"{file.path}:{i.line} imports {i.module}" for i in file.imports if within(i.module, ("networks",))
        ]
        breaches += [
            f"{file.path}:{call.lineno} imports {ast.unparse(call.args[0])} by name"
            for call in calls(file.tree)
            if ast.unparse(call.func).endswith("import_module") and call.args
            and isinstance(call.args[0], ast.Constant) and within(str(call.args[0].value), ("networks",))
        ]  # fmt: skip
    return breaches


def nobody_imports_entry_scripts(files: Sequence[SourceFile]) -> list[str]:
    """Entry scripts import neither each other nor networks or tools; nothing but tests imports them."""
    scripts = tuple(file.module for file in files if file.is_entry_script)
    not_for_scripts = (*scripts, "networks", "tools", "finetune")
    return [
        f"{file.path}:{item.line} imports {item.module}"
        for file in files
        if not file.is_test
        for item in file.imports
        if within(item.module, not_for_scripts if file.is_entry_script else scripts)
    ]


def only_command_lines_import_argparse(files: Sequence[SourceFile]) -> list[str]:
    return [
        f"{file.path}:{item.line} imports argparse"
        for file in files
        if not (file.is_tool or file.is_test or within(file.module, ("library.cli", "library.options")))
        for item in file.imports
        if within(item.module, ("argparse",))
    ]


def command_lines_start_without_torch(files: Sequence[SourceFile]) -> list[str]:
    """Entry scripts, library.cli and every options.py import no heavy package, directly or through another file."""
    by_module = {file.module: file for file in files}
    breaches = []
    for file in files:
        is_light = file.is_entry_script or within(file.module, ("library.cli", "library.options"))
        if is_light or (file.path.startswith("library/") and file.path.endswith("options.py")):
            chain = _chain_to_heavy(file, by_module, frozenset())
            if chain:
                breaches.append(" -> ".join(chain))
    return breaches


def _chain_to_heavy(file: SourceFile, by_module: dict[str, SourceFile], seen: frozenset[str]) -> list[str]:
    """How importing `file` comes to import a heavy package: paths, then the package; empty where it does not."""
    for item in file.imports:
        if not item.at_import:
            continue
        if within(item.module, HEAVY):
            return [f"{file.path}:{item.line}", item.module]
        target = by_module.get(item.module) or by_module.get(item.module.rpartition(".")[0])
        if target is not None and target.module not in seen:
            chain = _chain_to_heavy(target, by_module, seen | {file.module})
            if chain:
                return [f"{file.path}:{item.line}", *chain]
    return []


def importing_changes_nothing(files: Sequence[SourceFile]) -> list[str]:
    """Import reads no environment variable, touches no device and patches no other module, as far as syntax shows."""
    breaches = []
    for file in files:
        if not within(file.module, ("library", "networks")) or file.is_tool:
            continue
        imported = {alias for node in ast.walk(file.tree) for alias in _aliases(node)}
        for node in nodes_run_at_import(file.tree):
            text = ast.unparse(node) if isinstance(node, (ast.Attribute, ast.Call)) else ""
            if isinstance(node, ast.Attribute) and text in ENVIRONMENT:
                breaches.append(f"{file.path}:{node.lineno} reads {text} at import")
            elif isinstance(node, ast.Call) and text.startswith(DEVICE_CALLS):
                breaches.append(f"{file.path}:{node.lineno} calls {text} at import")
            elif isinstance(node, ast.Call) and ast.unparse(node.func) == "setattr":
                breaches.append(f"{file.path}:{node.lineno} patches by {text} at import")
            for target in _assigned_attributes(node):
                if ast.unparse(target).partition(".")[0] in imported:
                    breaches.append(f"{file.path}:{target.lineno} patches {ast.unparse(target)} at import")
    return breaches


def nothing_below_scripts_prints(files: Sequence[SourceFile]) -> list[str]:
    return [
        f"{file.path}:{call.lineno} prints; use logging"
        for file in files
        if within(file.module, ("library", "networks")) and not file.is_tool
        for call in calls(file.tree)
        if isinstance(call.func, ast.Name) and call.func.id == "print"
    ]


# ---------------------------------------------------------------------------------------------- syntax


def calls(tree: ast.AST) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))


def nodes_run_at_import(node: ast.AST) -> Iterator[ast.AST]:
    """Everything evaluated when the file is imported: not function bodies, not `if __name__ == "__main__":`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "__name__" in ast.unparse(child.test):
            continue
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            for part in (*child.decorator_list, child.args):
                yield part
                yield from nodes_run_at_import(part)
        elif not isinstance(child, ast.Lambda):
            yield child
            yield from nodes_run_at_import(child)


def _aliases(node: ast.AST) -> list[str]:
    """The names an import statement binds."""
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return [(name.asname or name.name).partition(".")[0] for name in node.names]
    return []


def _assigned_attributes(node: ast.AST) -> list[ast.Attribute]:
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    is_assignment = isinstance(node, (ast.Assign, ast.AugAssign, ast.AnnAssign))
    return [target for target in targets if isinstance(target, ast.Attribute)] if is_assignment else []
