"""Read JSON files that other programs wrote, with one line that names the file as the error; write standard JSON."""

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeGuard

from tidar_megatron.errors import UserError

SHOWN = 60  # characters of a value in a message


def finite(value: Any) -> Any:
    """Return ``value`` with None for every number that is infinite or NaN, which JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_object(path: Path, missing: str = "copy the folder again") -> dict[str, Any]:
    """Return the JSON object in a file.

    Args:
        path: The file to read; it must be a regular file.
        missing: The remedy that the message gives when the file is missing.

    Raises:
        UserError: The file is missing, unreadable, not UTF-8 or not JSON, contains NaN, or holds another type than an
            object.
    """
    value = parse(read_text(path, missing), path)
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds {type_name(value)}, not a JSON object; copy it again")
    return value


def read_text(path: Path, missing: str = "copy the folder again") -> str:
    """Return the text of a UTF-8 file.

    Raises:
        UserError: The file is missing, cannot be read, or is not UTF-8.
    """
    problem = not_a_file(path)
    if problem:
        raise UserError(f"{path}: {problem}; {missing}")
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 (byte {error.start}); copy it again") from None


def not_a_file(path: Path) -> str | None:
    """Return why ``path`` is not a regular file (missing, a folder, a loop of links, a pipe), or None if it is one."""
    try:
        if path.is_file():
            return None
        path.stat()
    except FileNotFoundError:
        return "not found"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    except ValueError:  # a zero byte in the name
        return "not a file name"
    return "is a folder, not a file" if path.is_dir() else "is not a regular file"


def parse(text: str, where: object) -> Any:
    """Return the value of a JSON text; ``where`` is the file or flag that an error message names.

    Raises:
        UserError: The text is not JSON, or it contains NaN, which is not JSON and equals nothing, not even itself.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise UserError(f"{where}: is nested too deeply; copy it again") from None
    except ValueError as error:  # json raises it for integers of thousands of digits too
        raise UserError(f"{where}: is not JSON ({error}); copy it again") from None
    for key in _keys_of_nan(value):
        raise UserError(f"{where}: {key} is NaN, which is not a value; correct it")
    return value


def _keys_of_nan(value: Any, key: str = "") -> Iterator[str]:
    pending = [(key, value)]
    while pending:
        key, value = pending.pop()
        if isinstance(value, dict):
            pending += [(f"{key}.{name}" if key else name, item) for name, item in value.items()]
        elif isinstance(value, list):
            pending += [(f"{key}[{place}]", item) for place, item in enumerate(value)]
        elif isinstance(value, float) and math.isnan(value):
            yield key or "the value"


def is_number(value: Any) -> TypeGuard[float]:
    """Return whether a JSON value is a number that a float can hold."""
    is_one = isinstance(value, int | float) and not isinstance(value, bool)
    return is_one and -sys.float_info.max <= value <= sys.float_info.max


def is_count(value: Any) -> TypeGuard[int]:
    """Return whether a JSON value is a positive integer."""
    return type(value) is int and value > 0


def type_name(value: Any) -> str:
    """Return the JSON name of a value's type."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def shown(value: Any) -> str:
    """Return a value as JSON on one line, truncated to :data:`SHOWN` characters, for a message."""
    return cut(json.dumps(value, default=str), SHOWN)


def one_line(error: BaseException, most: int = 200) -> str:
    """Return an exception's message on one line, truncated to ``most`` characters; its type if it has no message."""
    return cut(" ".join(str(error).split()) or type(error).__name__, most)


def cut(text: str, most: int = 200) -> str:
    """Return the first ``most`` characters of a text, followed by ``..`` if there are more."""
    return text if len(text) <= most else text[:most] + ".."
