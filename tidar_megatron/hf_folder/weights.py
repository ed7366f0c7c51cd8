"""The safetensors files of a folder and the contents of their headers, without reading a tensor."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from tidar_megatron.errors import UserError
from tidar_megatron.json_files import not_a_file, one_line, read_object, shown

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DRAFT_WEIGHTS = "draft_weights.safetensors"  # those of an adapter in the same folder, which are not the model's


@dataclass(frozen=True)
class Stored:
    """A stored tensor: its shape, its dtype as safetensors names it (``BF16``), and its file."""

    shape: tuple[int, ...]
    dtype: str
    file: Path


def weight_files(folder: str | Path, other_names: bool = False) -> list[Path]:
    """Return the safetensors files that transformers reads: ``model.safetensors``, or the files of the index.

    Args:
        folder: A local folder.
        other_names: Whether to return all ``*.safetensors`` of the model if there is neither.

    Raises:
        UserError: There are no safetensors, or the index names a file that is missing.
    """
    folder = Path(folder)
    single, index = folder / WEIGHTS, folder / INDEX
    if _is_there(single):
        files = [single]
    elif _is_there(index):
        files = _files_of_index(index)
    else:
        files = sorted(folder.glob("*.safetensors")) if other_names else []
        files = [file for file in files if file.name != DRAFT_WEIGHTS]
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
    return path.exists() or path.is_symlink()  # a broken link is an error, not an absent file


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
    """Return safetensors' handle of a file, which reads tensors on demand.

    Raises:
        UserError: The file is truncated or broken.
    """
    try:
        return safe_open(str(file), framework="pt")
    except (SafetensorError, OSError, ValueError, OverflowError) as error:
        raise UserError(f"{file}: is not a complete safetensors file ({one_line(error)}); copy it again") from None


def stored_tensors(folder: str | Path, other_names: bool = False) -> dict[str, Stored]:
    """Return the tensors in the folder's safetensors (:func:`weight_files`), by name, from the files' headers.

    Args:
        folder: A local folder.
        other_names: As in :func:`weight_files`.

    Raises:
        UserError: There are no safetensors, or a file is missing or broken.
    """
    found: dict[str, Stored] = {}
    for file in weight_files(folder, other_names):
        handle = open_safetensors(file)
        for name in handle.keys():  # noqa: SIM118
            about = handle.get_slice(name)
            found[name] = Stored(tuple(about.get_shape()), about.get_dtype(), file)
    return found
