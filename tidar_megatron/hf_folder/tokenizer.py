"""Reading of a folder's tokenizer; an error is one line that names file and key."""

import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tidar_megatron.errors import UserError
from tidar_megatron.hf_folder.blame import Tree, key_to_blame
from tidar_megatron.json_files import is_number, not_a_file, one_line, read_object, read_text, shown

FAST, SETTINGS = "tokenizer.json", "tokenizer_config.json"
OBJECTS = (FAST, SETTINGS, "special_tokens_map.json", "added_tokens.json", "vocab.json")
TEXTS = ("merges.txt", "vocab.txt", "chat_template.jinja")
PROBE = "a b"


def read_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a local folder; no code of the folder is run.

    Raises:
        UserError: One of its files is broken, or transformers rejects it; the message names file and key.
    """
    folder = Path(folder)
    trees = {name: read_object(folder / name) for name in OBJECTS if _is_there(folder / name)}
    for name in TEXTS:
        if _is_there(folder / name):
            read_text(folder / name)
    if _is_there(folder / "tokenizer.model") and (problem := not_a_file(folder / "tokenizer.model")):
        raise UserError(f"{folder / 'tokenizer.model'}: {problem}; copy the folder again")
    _check_settings(trees.get(SETTINGS, {}), folder / SETTINGS)
    try:
        return _accepted(folder)
    except BaseException as error:  # nearly any type; a Rust panic is not an Exception
        if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
            raise
        raise _refusal(folder, trees, error) from error


def _is_there(path: Path) -> bool:
    return path.exists() or path.is_symlink()


def _check_settings(settings: Tree, path: Path) -> None:
    """Refuse settings that transformers accepts but that fail with the first text."""
    for key, value in settings.items():
        wrong = None
        if value is None:
            continue
        if key.endswith("_token") and not key.startswith("add_"):
            content = value.get("content") if isinstance(value, dict) else value
            wrong = None if isinstance(content, str) else "a token"
        elif key == "model_max_length":
            wrong = None if is_number(value) and value > 0 else "a number above 0"
        elif key in ("tokenizer_class", "backend"):
            wrong = None if isinstance(value, str) else "a name"
        if wrong:
            raise UserError(f"{path}: {key} {shown(value)} is not {wrong}; correct it")


def _accepted(folder: str | Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer, after trying its common methods."""
    tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    ids = tokenizer(PROBE)["input_ids"]
    tokenizer(PROBE, add_special_tokens=False)
    tokenizer.decode(ids, skip_special_tokens=True)
    assert tokenizer.get_vocab(), "it has no tokens"
    return tokenizer


def _refusal(folder: Path, trees: dict[str, Tree], error: BaseException) -> UserError:
    """Return the error which says what file the libraries reject, with the key if it can be found."""
    attempts: dict[str, Callable[[Tree], object]] = {}
    if FAST in trees:
        try:
            Tokenizer.from_file(str(folder / FAST))
        except BaseException as own:  # a Rust panic, as above
            key = key_to_blame(trees[FAST], lambda tree: Tokenizer.from_str(json.dumps(tree)), own)
            return _error(folder / FAST, trees[FAST], key, own)
    for name in trees:
        attempts[name] = lambda tree, name=name: _with(folder, name, tree)  # type: ignore[misc]
    for name, attempt in sorted(attempts.items(), key=lambda item: item[0] == FAST):  # the large one last
        if (key := key_to_blame(trees[name], attempt, error)) is not None:
            return _error(folder / name, trees[name], key, error)
    there = _is_there(folder / FAST)
    why = one_line(error) if there else "the folder has no tokenizer.json; copy the model's tokenizer into it"
    return UserError(f"{folder / FAST if there else folder}: its tokenizer cannot be loaded: {why}")


def _error(path: Path, tree: Tree, key: str | None, error: BaseException) -> UserError:
    if key is None:
        return UserError(f"{path}: the tokenizer cannot be loaded ({one_line(error)}); copy it again")
    value: Any = tree
    for part in key.split("."):
        value = value[part]
    return UserError(
        f"{path}: the tokenizer cannot be loaded with {key} {shown(value)} ({one_line(error)}); correct it"
    )


def _with(folder: Path, name: str, tree: Tree) -> PreTrainedTokenizerBase:
    """Return the folder's tokenizer with the content of the file ``name`` replaced by ``tree``."""
    with TemporaryDirectory() as copy:
        for path in folder.iterdir():
            if path.is_file() and path.name != name and not path.name.endswith((".safetensors", ".bin")):
                (Path(copy) / path.name).symlink_to(path.resolve())
        (Path(copy) / name).write_text(json.dumps(tree), encoding="utf-8")
        return _accepted(copy)
