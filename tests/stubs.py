"""Packages that cannot be installed without CUDA, as far as choosing them goes: names, and classes to build on.

python -m tests.stubs transformer_engine PROGRAM    runs PROGRAM as if transformer-engine were installed
"""

import importlib
import importlib.abc
import importlib.machinery
import sys
import types

import torch


class Stub(types.ModuleType):
    """A module in which everything that is asked for exists: classes in capitals, else modules."""

    __path__ = ()
    __version__ = "2.8.0"

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        if name[0].islower():
            return importlib.import_module(f"{self.__name__}.{name}")
        made = type(name, (torch.nn.Module,), {"__module__": self.__name__})
        setattr(self, name, made)
        return made


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports any module of the packages named."""

    def __init__(self, packages):
        self.packages = packages

    def find_spec(self, name, path=None, target=None):
        found = name.split(".")[0] in self.packages
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if found else None

    def create_module(self, spec):
        return Stub(spec.name)

    def exec_module(self, module):
        pass


if __name__ == "__main__":
    sys.meta_path.insert(0, Finder(sys.argv[1].split(",")))
    exec(compile(sys.argv[2], "program", "exec"), {"__name__": "program"})
