"""Configuration errors in the user's terms: where, which key, which value, what is allowed."""

from __future__ import annotations

import difflib
from functools import partial

from pydantic import ValidationError

from minidistill.config import hints, prime_rl
from minidistill.config import schema_tree as tree
from minidistill.config.layers import Layers
from minidistill.config.schema_tree import Part, Path
from minidistill.config.toml import dotted, inline
from minidistill.errors import UserError, UserErrors, printable
from minidistill.system.http import without_secrets

LONGEST_KEY = 10_000
"""Characters of an unknown key for which a similar one is looked for."""


def short(value: object, limit: int = 60) -> str:
    """A value as TOML on one line, cut to a readable length."""
    text = without_secrets(inline(value))
    return printable(text if len(text) <= limit else text[: limit - 1] + "…")


def place(origin: str, path: Path) -> str:
    """`file:line, key`, or the flag, which names its key already."""
    if origin.startswith("--"):
        return origin
    return f"{origin}, {dotted(path)}" if origin else dotted(path)


def unknown_key(path: Path, origin: str, assignment: str = "") -> UserError:
    """A key that the schema does not have, with what to write instead.

    `assignment` is ` = VALUE` if the value is known and short enough to repeat.
    """
    key = dotted(path)
    if fix := prime_rl.fix_for_key(path) or hints.fix_for_name(path):
        what = f"{key}{assignment} is not a setting of minidistill"
    else:
        what = f"there is no {key}{assignment}"
        nearest = nearest_key(path)
        fix = f"did you mean `{nearest}`?" if nearest else _keys_of_table(path)
    return UserError(what, place(origin, path), fix)


def from_validation(error: ValidationError, layers: Layers, files: str) -> UserError:
    """All errors that pydantic reports, one for each key."""
    problems: dict[Path, partial[UserError]] = {}  # made below, where they are shown
    for detail in error.errors(include_url=False, include_context=False):
        path = _schema_path(detail["loc"])
        if detail["type"] == "extra_forbidden":
            path = (*path, detail["loc"][-1])
            value = detail["input"]
            problems.setdefault(path, partial(_unknown_setting, path, layers, value))
        elif detail["type"] == "missing":
            problems.setdefault(path, partial(_missing, path, layers.origin(path) or files))
        elif detail["type"] != "default_factory_not_called":
            problems.setdefault(path, partial(_bad_value, path, layers))
    # A table that may also be `false` fails in both ways: what is wrong inside it says enough.
    outer = {path[:length] for path in problems for length in range(len(path))}
    innermost = [problem for path, problem in problems.items() if path not in outer]
    if len(innermost) == 1:
        return innermost[0]()
    shown = [problem() for problem in innermost[: UserErrors.SHOWN]]
    return UserErrors(shown, hidden=len(innermost) - len(shown))


def _unknown_setting(path: Path, layers: Layers, value: object) -> UserError:
    is_table = isinstance(value, dict | list) or value is None
    assignment = "" if is_table else f" = {short(value)}"
    return unknown_key(path, layers.origin(path), assignment)


def nearest_key(path: Path) -> str:
    """The valid key closest to an unknown one, or ""."""
    words = [str(part) for part in path]
    if sum(map(len, words)) > LONGEST_KEY:
        return ""
    pattern = tuple("*" if word.isdecimal() else word for word in words)
    keys = {".".join(map(str, key)): key for key, _ in tree.walk()}
    # The right words with a table left out: `loss.adv_tau`, `trainer.lora.rank`, `lr`.
    containing = [key for key in keys.values() if _is_subsequence(pattern, key)]
    if containing:
        return _with_indices(min(containing, key=len), words)
    # In an existing table, compare only with its keys: a long common prefix is no similarity.
    table = ".".join(pattern[:-1])
    if not table or table.removesuffix(".*") in keys:
        siblings = {str(key[-1]): key for key in keys.values() if key[:-1] == pattern[:-1]}
        close = difflib.get_close_matches(pattern[-1], siblings, n=1)
        if close:
            return _with_indices(siblings[close[0]], words)
    else:
        close = difflib.get_close_matches(".".join(pattern), keys, n=1, cutoff=0.7)
        if close:
            return _with_indices(keys[close[0]], words)
    # The right word, or almost, in the wrong table.
    last_words = {str(key[-1]) for key in keys.values()}
    close = difflib.get_close_matches(pattern[-1], last_words, n=1, cutoff=0.8)
    elsewhere = [key for key in keys.values() if close and key[-1] == close[0]]
    return _with_indices(elsewhere[0], words) if len(elsewhere) == 1 else ""


def _is_subsequence(pattern: tuple[str, ...], key: Path) -> bool:
    """Whether `key` has the words of `pattern` in order, and the same last one."""
    rest = iter(key)
    return pattern[-1] == key[-1] and all(word in rest for word in pattern)


def _with_indices(key: Path, words: list[str]) -> str:
    """`key` with the list indices among `words` in place of "*", or 0."""
    indices = iter([word for word in words if word.isdecimal()])
    return ".".join(next(indices, "0") if part == "*" else str(part) for part in key)


def _keys_of_table(path: Path) -> str:
    """What the innermost table on `path` that exists takes."""
    for length in range(len(path) - 1, -1, -1):
        located = tree.locate(path[:length])
        if located is not None:
            table, node = located
            name = f"[{dotted(table)}]" if table else "the top level"
            return f"{name} takes: {', '.join(tree.properties(node))}"
    return ""


def _missing(path: Path, origin: str) -> UserError:
    key = dotted(path)
    is_env = path == ("orchestrator", "env")
    fix = 'add [[orchestrator.env]] with id = "sokoban-env"' if is_env else f"set {key}"
    return UserError(f"{key} is required", place(origin, path), fix)


def _bad_value(path: Path, layers: Layers) -> UserError:
    key, value = dotted(path), layers.get(path)
    located = tree.locate(path)
    allowed = tree.describe(located[1]) if located else ""
    fix = prime_rl.fix_for_value(key, value) or f"give {allowed}"
    if "list of tables" in allowed and isinstance(value, dict):
        fix = f"write [[{key}]] with two brackets"
    what = f"{key} = {short(value)} is not allowed; it takes {allowed}"
    return UserError(what, place(layers.origin(path), path), fix)


def _schema_path(location: tuple[Part, ...]) -> Path:
    """Pydantic's location without the names that it adds for the members of a union."""
    node = tree.root()
    path: Path = ()
    for part in location:
        child = tree.child(node, part)
        if child is not None:
            node, path = child, (*path, part)
    return path
