"""Find the project's data files by name, wherever the package was installed from.

`configs/`, `conversion/` and `training_recipes/` hold data only; a file's stem is its registry key. A wheel carries the
three folders inside the package (`transformers_k2/_data/`), an editable install or a checkout has them at its top level.
"""

from __future__ import annotations

import difflib
from pathlib import Path

SUFFIXES = {"configs": (".json",), "conversion": (".yaml",), "training_recipes": (".yaml",)}
_PACKAGE = Path(__file__).resolve().parent


def folder(kind: str) -> Path:
    """The folder that holds `kind` ("configs", "conversion" or "training_recipes").

    Raises:
        ValueError: `kind` is not one of the three.
        FileNotFoundError: the installation lost its data folders.
    """
    if kind not in SUFFIXES:
        raise ValueError(f"Unknown resource kind {kind!r}: expected one of {', '.join(SUFFIXES)}.")
    for candidate in (_PACKAGE / "_data" / kind, _PACKAGE.parents[1] / kind):
        if candidate.is_dir():
            return candidate
    raise FileNotFoundError(
        f"The {kind}/ folder is missing from this installation of transformers_k2; reinstall it."
    )


def names(kind: str) -> list[str]:
    """The registry keys of `kind`: the sorted stems of its data files."""
    return sorted(path.stem for path in folder(kind).iterdir() if path.suffix in SUFFIXES[kind])


def find(kind: str, name: str | Path) -> Path:
    """The file of `kind` called `name`: a path to an existing file, a file name, or a stem.

    Raises:
        ValueError: nothing is called so; the message gives the nearest name and all choices.
    """
    path = Path(name)
    if path.suffix in SUFFIXES.get(kind, ()) and path.is_file():
        return path
    home = folder(kind)
    if len(path.parts) <= 2 and path.parts[:-1] in ((), (kind,)):
        stem = path.name.removesuffix(path.suffix) if path.suffix in SUFFIXES[kind] else path.name
        for suffix in SUFFIXES[kind]:
            if (home / f"{stem}{suffix}").is_file():
                return home / f"{stem}{suffix}"
    choices = names(kind)
    near = difflib.get_close_matches(path.stem, choices, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(
        f"No {kind} file called {str(name)!r}.{hint} Choices: {', '.join(choices)}; or give a path."
    )
