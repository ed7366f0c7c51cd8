"""Fault 17: a .bin/.idx pair that is cut or mixed up ends the program with the file's name; caches stay whole."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import ROOT
from tests.programs import own_lines
from tidar_megatron.data.index import open_index
from tidar_megatron.data.shards import INDEX_FILE, ShardedDocuments, built_from
from tidar_megatron.data.tokenizer import byte_tokenizer


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Prefix and tokenizer of a sound pair."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    folder = tmp_path_factory.mktemp("pair")
    byte_tokenizer().save_pretrained(folder / "tokenizer")
    draw, builder = np.random.default_rng(0), IndexedDatasetBuilder(f"{folder / 'text'}.bin", dtype=np.uint16)
    for length in draw.integers(1, 90, 60):
        builder.add_document(draw.integers(0, 256, length), [int(length)])
    builder.finalize(f"{folder / 'text'}.idx")
    return folder / "text", folder / "tokenizer"


def inspect(prefix, tokenizer):
    command = [sys.executable, "-W", "ignore", "tools/inspect_data.py", str(prefix), "--tokenizer", str(tokenizer)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=170)


def test_a_cut_or_mixed_up_pair_ends_with_the_files_name(pair, tmp_path):
    """Fault 17: a .bin or .idx that was really cut, also by one token and on a boundary, or taken from another pair:
    exit status 2, one line that names the file."""
    prefix, tokenizer = pair
    copy = tmp_path / "text"
    sound = inspect(prefix, tokenizer)
    assert sound.returncode == 0 and "60 documents" in sound.stdout, sound.stderr

    def restored():
        for suffix in (".bin", ".idx"):
            shutil.copy2(f"{prefix}{suffix}", f"{copy}{suffix}")

    def ends_with(name):
        done = inspect(copy, tokenizer)
        assert done.returncode == 2, done.stdout
        assert len(own_lines(done.stderr)) == 1 and name in done.stderr, done.stderr

    for suffix, cut in ((".bin", 2), (".bin", 90), (".idx", 8), (".idx", 8 + 61 * 8)):
        restored()
        os.truncate(f"{copy}{suffix}", Path(f"{copy}{suffix}").stat().st_size - cut)
        ends_with(f"text{suffix}")
    restored()
    assert inspect(copy, tokenizer).returncode == 0  # an index of ours is there now
    os.truncate(f"{copy}.bin", 1000)
    ends_with("text.bin")
    restored()
    with Path(f"{copy}.bin").open("ab") as stream:
        stream.write(b"of another pair.")
    ends_with("text.bin")


BUILDER = """
import sys, time
from pathlib import Path
from tidar_megatron.data import index, shards
folder, name, locks = sys.argv[1:]
marks = Path(folder).parent
def both(kind):  # whether the other process is as far as this one, waiting for it
    (marks / f"{name}.{kind}").touch()
    end = time.monotonic() + 100
    while len(list(marks.glob(f"*.{kind}"))) < 2 and time.monotonic() < end:
        time.sleep(0.01)
if locks == "no":
    def refuse(*arguments):
        raise OSError("no locks here")
    index.fcntl.flock = refuse
real = shards._scan
def slow(*arguments):
    records = real(*arguments)
    if locks == "no":
        both("building")
    else:
        (marks / f"{name}.building").touch()
        time.sleep(2)  # the other waits for the lock meanwhile
    return records
shards._scan = slow
both("here")
documents = shards.ShardedDocuments(folder)
print(sum(int(documents[n][:].sum()) for n in range(len(documents))))
"""


@pytest.mark.parametrize("locks", ["yes", "no"])
def test_two_processes_build_one_valid_index(shards, tmp_path, locks):
    """Fault 17: two processes that build one index at once leave one valid index, also where locks do not work."""
    folder = Path(shutil.copytree(shards[0], tmp_path / "data"))
    (folder / INDEX_FILE).unlink(missing_ok=True)
    command = [sys.executable, "-W", "ignore", "-c", BUILDER, str(folder)]
    processes = [
        subprocess.Popen([*command, str(n), locks], cwd=ROOT, stdout=subprocess.PIPE, text=True) for n in range(2)
    ]
    sums = [process.communicate(timeout=170)[0].strip() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert len(list(tmp_path.glob("*.building"))) == (2 if locks == "no" else 1)  # with locks one of them built
    documents = ShardedDocuments(shards[0])
    assert sums == [str(sum(int(documents[n][:].sum()) for n in range(len(documents))))] * 2
    assert [path.name for path in folder.iterdir() if "index" in path.name] == [INDEX_FILE]

    def never(add):
        raise AssertionError("it was whole")

    index = open_index(folder / INDEX_FILE, built_from(folder, documents.manifest), never)
    index.check()
    assert len(index) == len(documents)
