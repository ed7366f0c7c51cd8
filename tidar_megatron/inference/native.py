"""The layers of :mod:`~tidar_megatron.inference.lean` from C++, compiled once per machine by ``tidar compile``.

On processors with AVX-512 ``lean.cpp`` computes whole layers with kernels of its own (``lean_avx512.h``), which round
their sums otherwise than torch's. Elsewhere, and for quantized weights, it makes the calls that Python would make, so
no bit of an output changes.
"""

import hashlib
import os
import platform
import shlex
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
from tidar_megatron.files import cache_folder, replace_text, sha256_of, sync

SOURCE = Path(__file__).with_name("lean.cpp")
HEADER = SOURCE.with_name("lean_avx512.h")
NAME = "tidar_lean"
# a process of its own: a second build in one process gets another name
BUILD = """
import sys
from torch.utils.cpp_extension import load
load(sys.argv[1], [sys.argv[2]], build_directory=sys.argv[3], extra_cflags=["-O2", "-fno-strict-aliasing"])
"""


def library_file() -> Path:
    """Return the path of the compiled library for this source, torch, Python and processor; it may not exist."""
    sources = [file.read_text(encoding="utf-8") for file in (SOURCE, HEADER)]
    what = [*sources, torch.__version__, sys.version, platform.machine()]
    digest = hashlib.sha256("\n".join(what).encode()).hexdigest()[:16]
    return cache_folder() / "compiled" / f"{NAME}-{digest}{EXTENSION_SUFFIXES[0]}"


def compile_library() -> Path:
    """Compile ``lean.cpp``, in about a minute, and return the library's path.

    Raises:
        UserError: there is no C++ compiler or no ninja, the compiler failed, or the cache is not writable.
    """
    compiler, *_ = shlex.split(os.environ.get("CXX", "")) or ["c++"]
    for program in (compiler, "ninja"):
        if shutil.which(program) is None:
            raise UserError(f"{program}: not found; install it (apt-get install g++ ninja-build), and try again")
    path = library_file()
    try:
        path.parent.parent.mkdir(parents=True, exist_ok=True)
        path.parent.mkdir(mode=0o700, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            _build(Path(folder))
            built = Path(folder) / f"{NAME}.so"
            built.chmod(0o700)  # whatever the umask: a library that others can write is not loaded
            sync(built)
            replace_text(_checksum_file(path), sha256_of(built))
            os.replace(built, path)
            sync(path.parent)
    except OSError as error:
        raise UserError(f"{path.parent}: {error.strerror}; set TIDAR_CACHE to a folder that can be written") from error
    library.cache_clear()
    if library() is None:
        raise UserError(f"{path}: was compiled, but cannot be loaded; set TIDAR_CACHE to a new folder of your own")
    return path


def _build(folder: Path) -> None:
    """Compile the library into ``folder``.

    Raises:
        UserError: the compiler failed; the message has its first error.
    """
    command = [sys.executable, "-c", BUILD, NAME, str(SOURCE), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        reason = next((line for line in lines if "error: " in line), lines[-1] if lines else "no message")
        raise UserError(f"{SOURCE.name}: cannot be compiled here ({reason})")


@cache
def library() -> ModuleType | None:
    """Return the compiled library, or None if there is none for this machine that is whole and the user's own."""
    path = library_file()
    try:
        if not all(_is_own(each) for each in (path.parent, path)):
            return None
        if _checksum_file(path).read_text(encoding="utf-8") != sha256_of(path):
            return None
        spec = spec_from_file_location(NAME, path)
        assert spec is not None and spec.loader is not None
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
    except (OSError, ImportError):  # there is none, or this system does not run it
        return None
    return module


def _is_own(path: Path) -> bool:
    """Return whether only this user, or root, can write to ``path``: what is loaded runs as this user."""
    found = path.stat()
    return found.st_uid in (os.getuid(), 0) and not found.st_mode & 0o022


def _checksum_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")
