"""Find the key of a JSON file that a library does not accept.

transformers raises nearly anything for a bad value: its own validation errors, TypeError, ZeroDivisionError. These
messages seldom name the key, so the keys are tried in turn: the one without which the library goes on is to blame.
"""

import re
import time
from collections.abc import Callable, Iterator
from typing import Any

SECONDS = 20.0  # at most, for all trials

Tree = dict[str, Any]


def key_to_blame(tree: Tree, attempt: Callable[[Tree], object], error: BaseException) -> str | None:
    """Return the key (``rope_parameters.rope_theta`` of a nested one) that makes ``attempt(tree)`` fail.

    Args:
        tree: the JSON object.
        attempt: raises where it does not accept the object.
        error: what it raised for ``tree``; transformers' own validation names the field.
    """
    if (named := re.search(r"[Ff]ield '(\w+)'", str(error))) and named[1] in tree:
        return named[1]
    end = time.monotonic() + SECONDS
    for path in sorted(_paths(tree), key=lambda path: _suspicion(_at(tree, path)), reverse=True):
        if time.monotonic() > end:
            return None
        try:
            attempt(_without(tree, path))
        except Exception:
            continue
        return ".".join(path)
    return None


def _paths(tree: Tree, above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Nested keys come before the section that holds them: the narrowest answer is the best."""
    for key, value in tree.items():
        if isinstance(value, dict) and len(above) < 2 and len(value) <= 64:
            yield from _paths(value, (*above, key))
        yield (*above, key)


def _suspicion(value: Any) -> int:
    """What is tried first: no real model has these values."""
    if isinstance(value, bool):
        return 1
    if value is None or (isinstance(value, int | float) and (value <= 0 or value >= 2**31)):
        return 3
    return 2 if not isinstance(value, int | float) else 0


def _at(tree: Tree, path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def _without(tree: Tree, path: tuple[str, ...]) -> Tree:
    first, *rest = path
    if not rest:
        return {key: value for key, value in tree.items() if key != first}
    return tree | {first: _without(tree[first], tuple(rest))}
