"""A small file is replaced whole or not at all; the cache is where it is said to be."""

import os
import tempfile
from pathlib import Path

import pytest

from tidar_megatron.errors import UserError
from tidar_megatron.files import cache_folder, check_free, new_folder, replace_text


def test_a_text_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "word"
    replace_text(path, "old")
    assert [p.name for p in tmp_path.iterdir()] == ["word"]

    def killed(source, target):
        assert target == path and path.read_text() == "old"
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        replace_text(path, "new")
    assert path.read_text() == "old"


def written(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def write(folder: Path, last: str, *names: str, error: Exception | None = None) -> None:
    with new_folder(folder, last) as partial:
        for name in (last, *names):
            (partial / name).parent.mkdir(exist_ok=True)
            (partial / name).write_text(name)
        assert not (folder / last).exists()
        if error is not None:
            raise error


@pytest.mark.parametrize("kind", ["new", "deep", "empty", "link", "here"])
def test_a_folder_is_written_whole_or_not_at_all(kind, tmp_path, monkeypatch):
    where = tmp_path / "where"
    where.mkdir()
    folder = {"new": where / "a", "deep": where / "a" / "b", "here": Path()}.get(kind, where / "a")
    if kind in ("empty", "link"):
        (tmp_path / "empty").mkdir()
        folder = tmp_path / "empty"
    if kind == "link":
        folder = where / "link"
        folder.symlink_to(tmp_path / "empty")
    monkeypatch.chdir(where)
    before = folder.stat().st_ino if folder.exists() else None
    check_free("--output", folder)
    with pytest.raises(RuntimeError):
        write(folder, "last", error=RuntimeError())
    check_free("--output", folder)
    assert written(tmp_path) == {}
    write(folder, "last", "sub/z")
    assert written(folder) == {"last": "last", "sub/z": "sub/z"}
    assert len(list(tmp_path.rglob(".*"))) == 0
    assert before in (None, folder.stat().st_ino)  # where a shell stands, it still stands
    assert folder.is_symlink() == (kind == "link")
    with pytest.raises(UserError, match=r"--output .*: exists and is not empty; choose another folder or remove it"):
        check_free("--output", folder)


def test_what_makes_a_folder_what_it_is_comes_last(tmp_path, monkeypatch):
    def killed(self, target):
        if target.name == "last":
            raise KeyboardInterrupt
        os.rename(self, target)

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, "last", "a", "z")
    assert written(tmp_path) == {"a": "a", "z": "z"}


def test_a_folder_that_holds_something_gives_way_or_stays(tmp_path, monkeypatch):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "old").write_text("old")
    rename = os.rename

    def refused(self, target):
        if ".partial-" in self.name:
            raise PermissionError(13, "Permission denied")
        rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", refused)
        with pytest.raises(PermissionError):
            write(folder, "new")
    assert written(tmp_path) == {"folder/old": "old"}
    write(folder, "new")
    assert written(tmp_path) == {"folder/new": "new"}
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TIDAR_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("TIDAR_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "tidar-megatron"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: 1 / 0)
    monkeypatch.setenv("TIDAR_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path  # nobody's home is asked for
    monkeypatch.delenv("TIDAR_CACHE")

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    assert cache_folder().is_relative_to(tempfile.gettempdir())
