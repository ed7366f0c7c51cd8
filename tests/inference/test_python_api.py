"""``from tidar_megatron import ...``: the README's example runs, every name exists, none is imported too early."""

import ast
import re
import subprocess
import sys
from importlib import import_module

import pytest

import tidar_megatron
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()
SOURCE = ast.parse((ROOT / "tidar_megatron/__init__.py").read_text())


def test_the_example_of_the_readme(checkpoint, capsys):
    (example,) = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(example.splitlines()) <= 12
    assert example.count("runs/quickstart/hf") == 1
    names = {}
    exec(example.replace("runs/quickstart/hf", str(checkpoint)), names)
    model, prompt = names["model"], names["prompt"]
    text, *figures = capsys.readouterr().out.rsplit("\n", 3)
    found = tidar_megatron.generate(model, prompt, tidar_megatron.DecodeOptions(max_new_tokens=160))
    assert text == tidar_megatron.continuation(model.tokenizer, prompt, found.token_ids)
    assert re.fullmatch(r"(\w+ \d+\.\d\d tokens per forward\n){2}", "\n".join(figures))


@pytest.mark.process
def test_nothing_heavy_is_imported_before_it_is_used():
    program = "import sys, tidar_megatron\nassert 'load_model' in dir(tidar_megatron)\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-S", "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    assert not {"torch", "numpy", "transformers", "megatron", "yaml", "pydantic"} & loaded


def test_what_editors_see_is_what_there_is():
    """The imports for type checkers, ``__all__`` and the documentation name the same things."""
    typed = next(node for node in SOURCE.body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in typed.body for alias in node.names}
    assert sorted(seen) == sorted(tidar_megatron.__all__)
    for name, module in seen.items():
        assert getattr(tidar_megatron, name) is getattr(import_module(module), name)
        assert f"``{name}``" in tidar_megatron.__doc__
        assert name in dir(tidar_megatron)


def test_another_name_is_refused():
    with pytest.raises(AttributeError, match="module 'tidar_megatron' has no attribute 'load_models'"):
        tidar_megatron.load_models  # noqa: B018
    with pytest.raises(ImportError):
        from tidar_megatron import load_models  # noqa: F401
