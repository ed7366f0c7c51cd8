"""``tools/certify.py`` as a user runs it."""

import json

import pytest

from tests.programs import call


@pytest.mark.slow
def test_the_program(checkpoint, tmp_path):
    (tmp_path / "prompts.jsonl").write_text('"hello"\n"abc"\n')
    command = ["tools/certify.py", "--model", checkpoint, "--prompts", tmp_path / "prompts.jsonl"]
    more = ["--max-new-tokens", 8, "--draft-lengths", 2, "--samples", 50, "--json"]
    done = call(*command, *more)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["prompts"], found["identical"], found["ties"]) == (2, 2, 0)
    assert len(found["runs"]) == 2 * 7
    done = call(*command, "--samples", -1)
    assert done.returncode == 2 and "--samples -1: must be at least 0" in done.stderr
