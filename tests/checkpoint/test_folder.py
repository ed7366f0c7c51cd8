"""Publishing and pruning, without a model."""

import pytest

from tidar_megatron.checkpoint import folder
from tidar_megatron.checkpoint.folder import checkpoint_folder, restart_points, saved_iterations
from tidar_megatron.checkpoint.integrity import Damaged, check_hashes, read_manifest, seal


def publish(run, iteration, keep_last=None, content="some weights"):
    partial = folder.new_partial(run, iteration)
    (partial / "weights").write_text(content)
    folder.delete(folder.publish(partial, iteration, {"weights": seal(partial / "weights")}, keep_last))


def test_the_newest_are_kept(tmp_path):
    for iteration in range(1, 6):
        publish(tmp_path, iteration, keep_last=2)
    assert saved_iterations(tmp_path) == [4, 5]
    assert restart_points(tmp_path) == ([5, 4], [])
    assert not list(tmp_path.glob(".iter*"))


def test_a_damaged_one_neither_counts_nor_goes(tmp_path):
    """The last good one is never removed in favour of a damaged one."""
    publish(tmp_path, 1)
    publish(tmp_path, 2)
    publish(tmp_path, 3)
    (checkpoint_folder(tmp_path, 3) / "weights").write_text("cut")
    publish(tmp_path, 4, keep_last=2)
    assert saved_iterations(tmp_path) == [2, 3, 4]
    assert restart_points(tmp_path)[0] == [4, 2]


def test_one_is_always_kept(tmp_path):
    for iteration in (1, 2):
        publish(tmp_path, iteration, keep_last=1)
    assert saved_iterations(tmp_path) == [2]


def test_a_damaged_one_of_the_same_iteration_gives_way(tmp_path):
    publish(tmp_path, 1)
    (checkpoint_folder(tmp_path, 1) / "weights").unlink()
    publish(tmp_path, 1)
    check_hashes(checkpoint_folder(tmp_path, 1))
    assert not list(tmp_path.glob(".iter*"))


def test_what_a_killed_run_left_is_removed_and_nothing_else(tmp_path):
    publish(tmp_path, 1)
    (folder.new_partial(tmp_path, 2) / "half").write_text("x")
    (tmp_path / ".iter_0000003.removed-abcd").mkdir()
    (tmp_path / ".mine").mkdir()
    folder.remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"iter_0000001", folder.TRACKER, ".mine"}


def test_two_saves_of_one_iteration_never_share_a_folder(tmp_path):
    """A writer that outlived a killed run writes nowhere."""
    assert folder.new_partial(tmp_path, 1) != folder.new_partial(tmp_path, 1)


def test_every_changed_byte_of_a_manifest_is_seen(tmp_path):
    publish(tmp_path, 1)
    checkpoint = checkpoint_folder(tmp_path, 1)
    path = checkpoint / "manifest.json"
    content = path.read_bytes()
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(Damaged):
            check_hashes(checkpoint)
    path.write_bytes(content)
    check_hashes(checkpoint)


def complaint(checkpoint, share):
    """The file that one of three readers finds changed."""
    try:
        check_hashes(checkpoint, share, 3)
    except Damaged as damage:
        return str(damage).split(" was changed")[0].rsplit("/", 1)[1]
    return None


def test_hashing_is_shared(tmp_path):
    """Every file is some reader's."""
    partial = folder.new_partial(tmp_path, 1)
    files = {}
    for number in range(5):
        (partial / f"f{number}").write_text("x" * number)
        files[f"f{number}"] = seal(partial / f"f{number}")
    folder.publish(partial, 1, files, None)
    checkpoint = checkpoint_folder(tmp_path, 1)
    for number in range(1, 5):
        (checkpoint / f"f{number}").write_text("y" * number)
        assert [complaint(checkpoint, share) for share in range(3)].count(f"f{number}") == 1
        (checkpoint / f"f{number}").write_text("x" * number)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/b", "..", ""])
def test_a_manifest_leads_nowhere_else(tmp_path, name):
    publish(tmp_path, 1)
    path = checkpoint_folder(tmp_path, 1) / "manifest.json"
    path.write_text(path.read_text().replace('"weights"', f'"{name}"'))
    with pytest.raises(Damaged, match="cannot be read"):
        read_manifest(checkpoint_folder(tmp_path, 1))


def test_the_checkpoint_of_another_iteration_is_found_out(tmp_path):
    publish(tmp_path, 1)
    publish(tmp_path, 2)
    checkpoint_folder(tmp_path, 1).rename(checkpoint_folder(tmp_path, 3))
    (tmp_path / folder.TRACKER).write_text("3")
    points, said = restart_points(tmp_path)
    assert points == [2]
    assert said == [f"{checkpoint_folder(tmp_path, 3)} is the checkpoint of iteration 1"]
