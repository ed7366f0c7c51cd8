"""The layers of :mod:`~tidar_megatron.inference.lean` from C++, compiled once per machine by ``tidar compile``.

A layer makes about thirty short calls between its products. From Python they take a third of a small model's forward.
``lean.cpp`` makes the same calls, so no bit changes, and a machine without a C++ compiler only decodes more slowly.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import torch

from tidar_megatron.errors import UserError
from tidar_megatron.files import cache_folder

SOURCE = Path(__file__).with_name("lean.cpp")
NAME = "tidar_lean"


def library_file() -> Path:
    """Return the path of the compiled library for this source, torch, Python and processor; it may not exist."""
    what = [SOURCE.read_text(encoding="utf-8"), torch.__version__, sys.version, platform.machine()]
    digest = hashlib.sha256("\n".join(what).encode()).hexdigest()[:16]
    return cache_folder() / f"{NAME}-{digest}{EXTENSION_SUFFIXES[0]}"


def compile_library() -> Path:
    """Compile ``lean.cpp``, in about a minute, and return the library's path.

    Raises:
        UserError: there is no C++ compiler or no ninja, the compiler failed, or the cache is not writable.
    """
    from torch.utils import cpp_extension  # slow to import

    for program in (os.environ.get("CXX", "c++"), "ninja"):
        if shutil.which(program) is None:
            raise UserError(f"{program}: not found; install it (apt-get install g++ ninja-build), and try again")
    path = library_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            cpp_extension.load(NAME, [str(SOURCE)], build_directory=folder, extra_cflags=["-O2"], verbose=False)
            os.replace(Path(folder) / f"{NAME}.so", path)
    except OSError as error:
        raise UserError(f"{path.parent}: {error.strerror}; set TIDAR_CACHE to a folder that can be written") from error
    except (RuntimeError, subprocess.SubprocessError) as error:  # its message may be the compiler's whole output
        lines = str(error).splitlines()
        reason = next((line for line in lines if "error: " in line), lines[0])
        raise UserError(f"{SOURCE.name}: cannot be compiled here ({reason.strip()})") from error
    library.cache_clear()
    return path


@cache
def library() -> ModuleType | None:
    """Return the compiled library, or None if there is none for this machine."""
    path = library_file()
    if not path.is_file():
        return None
    spec = spec_from_file_location(NAME, path)
    assert spec is not None and spec.loader is not None
    try:
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError:  # of another torch build of the same version, or damaged
        return None
    return module
