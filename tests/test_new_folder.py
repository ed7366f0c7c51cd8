"""A folder is there whole or not at all, wherever it is to be, and whoever else writes there."""

import os
from pathlib import Path

import pytest

from tidar_megatron.errors import UserError
from tidar_megatron.new_folder import check_free, new_folder, os_error


def written(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def write(folder: Path, *names: str, error: Exception | None = None, replace: bool = False, meanwhile=None) -> None:
    """``last`` and ``names``, each holding its name."""
    with new_folder("--output", folder, "last", replace) as partial:
        for name in ("last", *names):
            (partial / name).parent.mkdir(exist_ok=True)
            (partial / name).write_text(name)
        if meanwhile is not None:
            meanwhile()
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
        write(folder, error=RuntimeError())
    with pytest.raises(UserError, match=r"--output .*: nothing was written \(\[Errno 28\] No space.*\); fix that"):
        write(folder, error=OSError(28, "No space left on device"))
    check_free("--output", folder)
    assert written(tmp_path) == {}
    during = []
    write(
        folder, "sub/z", meanwhile=lambda: during.extend([(folder / "last").exists(), *tmp_path.rglob(".*.partial-*")])
    )
    assert during[0] is False
    # on the file system of what is there, which may be a mount
    assert during[1].parent == (folder.resolve() if before is not None else folder.parent)
    assert written(folder) == {"last": "last", "sub/z": "sub/z"}
    assert len(list(tmp_path.rglob(".*"))) == 0
    assert before in (None, folder.stat().st_ino)  # where a shell stands, it still stands
    assert folder.is_symlink() == (kind == "link")
    with pytest.raises(
        UserError, match=r"--output .*: exists and is not empty \((last|sub) is there\); choose another"
    ):
        check_free("--output", folder)


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("name", ["theirs", "last", "sub"])
def test_what_another_process_put_there_meanwhile_stays(there, name, tmp_path):
    folder = tmp_path / "folder"
    if there:
        folder.mkdir()

    def other():
        folder.mkdir(exist_ok=True)
        (folder / name).write_text("theirs")

    with pytest.raises(UserError, match=r"nothing was written \(.*it is no longer empty"):
        write(folder, "sub/z", meanwhile=other)
    assert written(tmp_path) == {f"folder/{name}": "theirs"}
    with pytest.raises(UserError, match="it is no longer empty"):
        write(folder)
    assert written(tmp_path) == {f"folder/{name}": "theirs"}


def test_what_makes_a_folder_what_it_is_comes_last_and_what_came_before_goes_back(tmp_path, monkeypatch):
    rename, order = Path.rename, []

    def stopped(self, target):
        order.append(target.name)
        if target.name == "last" and order.count("last") == 1:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", stopped)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, "a", "m", "z")
    assert {*order[:3]} == {"a", "m", "z"} and order[3] == "last"
    assert list(tmp_path.iterdir()) == []
    write(tmp_path, "a")
    assert written(tmp_path) == {"a": "a", "last": "last"}


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), KeyboardInterrupt()])
def test_a_folder_that_holds_something_gives_way_where_that_is_meant(error, tmp_path, monkeypatch):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "old").write_text("old")
    with pytest.raises(UserError, match="it is no longer empty"):
        write(folder)
    rename = Path.rename

    def refused(self, target):
        if ".partial-" in self.name:
            raise error
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", refused)
        with pytest.raises((UserError, KeyboardInterrupt)):
            write(folder, replace=True)
    assert written(tmp_path) == {"folder/old": "old"}
    write(folder, replace=True)
    assert written(tmp_path) == {"folder/last": "last"}
    write(folder, "x", replace=True, meanwhile=lambda: (folder / "last").unlink())
    assert written(tmp_path) == {"folder/last": "last", "folder/x": "x"}
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_where_nothing_can_be(tmp_path):
    (tmp_path / "file").touch()
    os.symlink("loop", tmp_path / "loop")
    with pytest.raises(UserError, match=r"--output .*file: Not a directory; choose another folder"):
        check_free("--output", tmp_path / "file")
    for folder in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / "loop"):
        with pytest.raises(UserError, match=r"nothing was written \(\[Errno 20\] Not a directory"):
            write(folder)
    assert {path.name for path in tmp_path.iterdir()} == {"file", "loop"}


def test_the_refusals_of_rust_are_the_systems():
    full = os_error(Exception("Error while serializing: I/O error: No space left on device (os error 28)"))
    assert (full.errno, full.strerror) == (28, "No space left on device")
    assert str(os_error(Exception("something else"))) == "something else"
