"""Command lines. Importing this first says in one sentence when the program runs outside its environment."""

from importlib.util import find_spec

_missing = [package for package in ("torch", "toml", "tqdm") if find_spec(package) is None]
if _missing:
    raise SystemExit(
        f"the package {_missing[0]} is not installed for this Python; `python quickstart.py` makes an environment, "
        "start scripts with its .venv/bin/python (Windows: .venv\\Scripts\\python)"
    )
