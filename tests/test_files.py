"""A small file is replaced whole or not at all; the cache is where it is said to be."""

import os
import tempfile
from pathlib import Path

import pytest

from tidar_megatron.files import cache_folder, replace_text


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
