"""Mutate the JSON files of a folder, use the folder, and say what came of it, within limits of memory and time."""

import contextlib
import json
import math
import resource
import signal
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tidar_megatron.checkpoint.integrity import Damaged
from tidar_megatron.errors import UserError

VALUES: dict[str, Any] = {
    "null": None,
    "string": "foo",
    "negative": -1,
    "huge": 10**12,
    "list": [],
    "float": 0.5,
    "bool": True,
    "zero": 0,
    "NaN": math.nan,
    "nested": {"a": [1]},
}
GIB = 2**30
SECONDS = 60  # of one case; far more than any takes

Path_ = tuple[str | int, ...]


@dataclass(frozen=True)
class Mutation:
    """One value of one key of one file."""

    file: str
    path: Path_
    kind: str

    @property
    def key(self) -> str:
        """The name of the key; of a list's element the list's."""
        return next(str(part) for part in reversed(self.path) if isinstance(part, str))

    def __str__(self) -> str:
        return f"{self.file}: {'.'.join(map(str, self.path))} = {self.kind}"

    def apply(self, tree: Any) -> Any:
        """The tree with this value in it; the tree itself stays as it is."""
        tree = json.loads(json.dumps(tree))
        node = tree
        for part in self.path[:-1]:
            node = node[part]
        node[self.path[-1]] = VALUES[self.kind]
        return tree


def paths(tree: Any, most: int = 4, above: Path_ = ()) -> Iterator[Path_]:
    """Every key of a tree; of a long dictionary or list (a vocabulary, shards) the first ``most`` entries."""
    items: list[tuple[str | int, Any]]
    items = list(tree.items()) if isinstance(tree, dict) else list(enumerate(tree)) if isinstance(tree, list) else []
    for part, value in items if len(items) <= 40 and isinstance(tree, dict) else items[:most]:
        yield (*above, part)
        yield from paths(value, most, (*above, part))


def mutations(file: str, tree: Any) -> list[Mutation]:
    """Every key with every value."""
    return [Mutation(file, path, kind) for path in paths(tree) for kind in VALUES]


class Hang(BaseException):
    """A case took too long."""


@contextlib.contextmanager
def limits(seconds: int = SECONDS, most: int = GIB) -> Iterator[None]:
    """In this block no more than ``most`` bytes can be allocated, and what takes too long is ended by :class:`Hang`."""

    def hang(*_: object) -> None:
        raise Hang

    status = Path("/proc/self/status").read_text()
    size = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmSize")) * 1024
    before = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGALRM, hang)
    resource.setrlimit(resource.RLIMIT_AS, (size + most, before[1]))
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.signal(signal.SIGALRM, handler)


def _names(mutation: Mutation) -> list[str]:
    """What a message may call it by; a switch by what it switches on, a setting by its flag."""
    key = mutation.key.removeprefix("use_")
    return [mutation.file, key, "--" + key.replace("_", "-")]


def outcome(use: Callable[[], object], mutation: Mutation | None = None) -> str:
    """``"ok"``, ``"refused"``, or what is wrong: a traceback, a hang, a message of several lines or without a name."""
    try:
        with limits():
            use()
    except (UserError, Damaged) as error:
        said = str(error)
        if "\n" in said or not said:
            return f"WRONG message: {said!r}"
        if "allocate memory" in said:
            return f"WRONG memory: {said}"
        if mutation is not None and not any(name in said for name in _names(mutation)):
            return f"WRONG names neither the file nor the key: {said}"
        return "refused"
    except Hang:
        return f"WRONG: more than {SECONDS} s"
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        return f"WRONG {type(error).__name__} at {last.filename}:{last.lineno}: {error}"
    return "ok"
