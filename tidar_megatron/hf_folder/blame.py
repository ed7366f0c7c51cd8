"""Search for the key of a JSON file that makes a library reject the file.

For a bad value transformers raises almost any exception: its own validation errors, TypeError, ZeroDivisionError. The
message rarely names the key, so each key is left out in turn: the bad key is the one without which the library accepts
the file.
"""

import re
import time
from collections.abc import Callable, Iterator
from typing import Any

SECONDS = 20.0  # time limit for all trials together

Tree = dict[str, Any]


def key_to_blame(tree: Tree, attempt: Callable[[Tree], object], error: BaseException) -> str | None:
    """Return the key that makes ``attempt(tree)`` fail, such as ``rope_parameters.rope_theta``; None if none is found.

    Args:
        tree: The JSON object.
        attempt: A function that raises an exception if it rejects the object.
        error: The exception that ``attempt(tree)`` raised; transformers' own validation names the field in it.
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
    """Yield the paths of all keys; nested keys come before their section, because the narrowest answer is the best."""
    for key, value in tree.items():
        if isinstance(value, dict) and len(above) < 2 and len(value) <= 64:
            yield from _paths(value, (*above, key))
        yield (*above, key)


def _suspicion(value: Any) -> int:
    """Return how suspicious a value is; keys whose values no real model has are tried first."""
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
