"""Every module is imported, so that a name which a dependency moved is found; and the bounds of the dependencies."""

import importlib
import pkgutil
import tomllib

import pytest
from packaging.requirements import Requirement

import tidar_megatron
from tests.conftest import ROOT

MODULES = [module.name for module in pkgutil.walk_packages(tidar_megatron.__path__, "tidar_megatron.")]
OPTIONAL = {"lm_eval"}  # imported at the top of a module, and not a dependency


@pytest.mark.parametrize("name", [name for name in MODULES if not name.endswith("__main__")])
def test_module_is_imported(name):
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as missing:
        if missing.name not in OPTIONAL:
            raise
        pytest.skip(f"{missing.name} is not installed")


def test_the_lowest_versions_are_those_that_are_admitted():
    """make test-lowest tests the lower bound of every dependency, and each has one."""
    lines = (ROOT / "constraints-lowest.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    pinned = {pin.name.lower(): pin.specifier for pin in pins}
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    for dependency in map(Requirement, dependencies):
        if dependency.marker is None:  # triton is as torch asks for it
            (lowest,) = (bound.version for bound in dependency.specifier if bound.operator == ">=")
            assert pinned[dependency.name].contains(lowest), f"{dependency}: other than {pinned[dependency.name]}"
