"""The prose is plain English, as far as a program can tell: a docstring says what the thing does or is."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
# a first line that begins with one of these has no subject, or no verb
FRAGMENTS = frozenset(
    # prepositions
    "about above across after against along among around as at because before behind below beneath beside besides "
    "between beyond by despite down during for from in inside into like near of off on onto out outside over past per "
    "since through throughout till to toward towards under underneath until unto up upon via with within without "
    # relative and interrogative words
    "how that what whatever when whenever where wherever whether which whichever while who whoever whom whose why "
    # words that lean on a sentence before
    "also and both but either here it less likewise neither nor or same so such than their them then there these they "
    "this those though thus too yet".split()
)
FEWEST_WORDS = 3  # "Scaled." and "In the mean." say nothing
STILTED = {  # phrases that no engineer says aloud -> what to write instead
    r"whole or not at all": "atomically",
    r"of a wrong kind": "of an invalid type",
    r"(?i)in the mean\b": "on average",
    r"(?i)\bof so many": "of N",
    r"so many (tokens|steps|rows|bytes)": "N tokens",
}


def public_docstrings(path):
    """Yield (line, name, first line) of each public docstring in a file; the module's own is named by the file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            text = ast.get_docstring(node)
            if text:
                yield node.lineno, node.name, text.split("\n\n")[0].replace("\n", " ")


def fragments(path):
    """Yield a line for each docstring whose first sentence is no sentence."""
    for line, name, first in public_docstrings(path):
        words = re.findall(r"[A-Za-z']+", re.sub(r"``[^`]*``|:\w+:`[^`]*`", "X", first))
        if len(words) < FEWEST_WORDS or words[0].lower() in FRAGMENTS:
            yield f"{path.relative_to(ROOT)}:{line}: {name}: {first}"


def python_files():
    for folder in ("tidar_megatron", "tools", "examples"):
        yield from sorted((ROOT / folder).rglob("*.py"))


def test_docstrings_have_a_subject_and_a_verb():
    found = [said for path in python_files() for said in fragments(path)]
    assert not found, "\n".join([f"{len(found)} docstrings", *found])


def test_nothing_stilted_is_written():
    found = []
    for path in python_files():
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            for said, better in STILTED.items():
                if re.search(said, line):
                    found.append(f"{path.relative_to(ROOT)}:{number}: write {better!r}: {line.strip()}")
    assert not found, "\n".join([f"{len(found)} lines", *found])
