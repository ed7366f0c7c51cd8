"""The safetensors of a folder: which files they are, and what their headers say, without reading a tensor."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from tidar_megatron.errors import UserError
from tidar_megatron.json_files import not_a_file, one_line, read_object, shown

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class Stored:
    """One tensor: its shape, its dtype as safetensors names it (``BF16``), and its file."""

    shape: tuple[int, ...]
    dtype: str
    file: Path


def weight_files(folder: str | Path, other_names: bool = False) -> list[Path]:
    """Return the safetensors files that transformers reads: the single one, else those of the index.

    Args:
        folder: local.
        other_names: take ``*.safetensors`` where there is neither.

    Raises:
        UserError: there are none, or the index names one that is not there.
    """
    folder = Path(folder)
    single, index = folder / WEIGHTS, folder / INDEX
    if _is_there(single):
        files = [single]
    elif _is_there(index):
        files = _files_of_index(index)
    else:
        files = sorted(folder.glob("*.safetensors")) if other_names else []
    if not files:
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        why = f"; {pickles[0]} is a pickle, which is not opened" if pickles else ""
        raise UserError(f"{folder}: holds no *.safetensors{why}; save the model with safe serialization")
    for file in files:
        if problem := not_a_file(file):
            named = f"named in {INDEX} but missing" if problem == "not found" else problem
            raise UserError(f"{file}: {named}; copy the whole folder again")
    return files


def _is_there(path: Path) -> bool:
    return path.exists() or path.is_symlink()  # a link that leads nowhere is told of, not passed over


def _files_of_index(index: Path) -> list[Path]:
    content = read_object(index)
    where = content.get("weight_map")
    if not isinstance(content.get("metadata", {}), dict):  # transformers reads it
        raise UserError(f"{index}: metadata {shown(content['metadata'])} is not a section; copy it again")
    if not isinstance(where, dict) or not where:
        raise UserError(f"{index}: has no weight_map from tensors to files; copy it again")
    for tensor, name in where.items():
        if not isinstance(name, str) or Path(name).name != name or "\0" in name:
            raise UserError(f"{index}: weight_map.{tensor} {name!r} is not a file name; copy it again")
    return sorted({index.parent / name for name in where.values()})


def open_safetensors(file: Path) -> Any:
    """Return safetensors' handle of a file; its tensors are read when they are asked for.

    Raises:
        UserError: the file is cut or broken.
    """
    try:
        return safe_open(str(file), framework="pt")
    except (SafetensorError, OSError, ValueError, OverflowError) as error:
        raise UserError(f"{file}: no whole safetensors file ({one_line(error)}); copy it again") from None


def stored_tensors(folder: str | Path, other_names: bool = False) -> dict[str, Stored]:
    """Return what lies in the folder's safetensors (:func:`weight_files`), by the names of the tensors.

    Raises:
        UserError: there are none, or a file is missing or broken.
    """
    found: dict[str, Stored] = {}
    for file in weight_files(folder, other_names):
        handle = open_safetensors(file)
        for name in handle.keys():  # noqa: SIM118
            about = handle.get_slice(name)
            found[name] = Stored(tuple(about.get_shape()), about.get_dtype(), file)
    return found
