"""What a model wrote runs in a fence: it passes or not, and reaches nothing."""

import os
import time

import pytest

from tests.random_models import write_random_model
from tidar_megatron.data.tokenizer import byte_tokenizer
from tidar_megatron.evaluation import code
from tidar_megatron.evaluation.code import human_eval, passes
from tidar_megatron.inference.loading import load_model

pytestmark = pytest.mark.process

PROBLEM = {
    "prompt": "def double(n):\n",
    "test": "def check(f):\n    assert f(2) == 4\n    assert f(-1) == -2\n",
    "entry_point": "double",
}


def test_right_and_wrong_programs():
    checks = f"{PROBLEM['test']}\ncheck(double)\n"
    assert passes(f"def double(n):\n    return 2 * n\n{checks}") == (True, "")
    assert passes(f"import math, typing, collections\nprint('said')\ndef double(n):\n    return n + n\n{checks}")[0]
    assert passes(f"def double(n):\n    return n\n{checks}") == (False, "AssertionError")
    assert passes("def double(n:\n") == (False, "SyntaxError: '(' was never closed")


@pytest.mark.parametrize(
    "program",
    ["import sys; sys.exit(0)", "import os; os._exit(0)", "raise SystemExit", "quit()", "raise KeyboardInterrupt"],
)
def test_to_leave_early_is_not_to_pass(program):
    assert not passes(program)[0]


def test_time_and_memory_are_limited():
    start = time.monotonic()
    assert passes("while True: pass", seconds=1) == (False, "timed out")
    assert passes("import signal, time\nsignal.signal(signal.SIGALRM, signal.SIG_IGN)\ntime.sleep(60)", seconds=1) == (
        False,
        "timed out",
    )
    assert time.monotonic() - start < 20
    assert "MemoryError" in passes("x = bytearray(3 << 30)")[1]
    assert not passes("open('large', 'wb').write(bytes(1 << 22))")[0]


def test_a_flood_of_words_is_cut():
    """It neither fills this process's memory nor makes the program wait for a reader."""
    assert not passes("import os\nwhile True: os.write(2, b'x' * 65536)", seconds=3)[0]
    assert passes("print('x' * (1 << 24))")[0]


def test_what_it_starts_ends_with_it(tmp_path):
    """The child holds the standard files open; when it is stopped, it cannot write."""
    files = []
    for number, ending in enumerate(["", "os._exit(0)", "time.sleep(60)"]):
        files.append(tmp_path / str(number))
        child = f"import time; time.sleep(2); open({str(files[-1])!r}, 'w').close()"
        program = f"import os, subprocess, sys, time\nsubprocess.Popen([sys.executable, '-c', {child!r}])\n{ending}"
        assert passes(program, seconds=1)[0] == (ending == "")
    time.sleep(2.5)
    assert not any(file.exists() for file in files)


def test_nothing_is_inherited_and_nothing_is_left(tmp_path, monkeypatch):
    monkeypatch.setenv("A_SECRET", "key")
    assert passes("import os; assert 'A_SECRET' not in os.environ")[0]
    assert passes("import os; assert os.listdir('.') == []; open('here', 'w').write('x')")[0]
    assert not os.path.exists("here")


def test_the_network_is_another_one_where_the_kernel_allows_it():
    program = "import socket\ns = socket.socket()\ns.settimeout(1)\ns.connect(('127.0.0.1', {port}))"
    import socket

    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        can_leave = passes("import ctypes\nassert ctypes.CDLL(None).unshare(0x40000000) == 0")[0]
        if not can_leave:
            pytest.skip("no network namespaces here")
        assert not passes(program.format(port=server.getsockname()[1]))[0]


def test_pass_at_1_by_a_plan_and_by_ar(tmp_path, monkeypatch):
    import json

    folder = write_random_model(tmp_path / "hf", "llama")
    config = json.loads((folder / "config.json").read_text())
    config["tidar"] = {"mask_token_id": 257, "block_size": 4}
    (folder / "config.json").write_text(json.dumps(config))
    byte_tokenizer().save_pretrained(str(folder))
    model = load_model(folder)
    row = human_eval(model, "1:4", max_new_tokens=12, problems=[PROBLEM])
    assert (row["scores"], row["ar_scores"], row["scores_differ"]) == ({"pass@1": 0.0}, {"pass@1": 0.0}, False)
    assert row["tokens_per_forward"] >= 1
    monkeypatch.setattr(code, "_until_stop", lambda text: "    return 2 * n\n")
    assert human_eval(model, "1:4", max_new_tokens=4, problems=[PROBLEM])["scores"] == {"pass@1": 1.0}


def test_a_completion_ends_where_another_definition_begins():
    assert code._until_stop("    return 1\n\ndef other():\n    pass\nclass A: pass") == "    return 1\n"
    assert code._until_stop("    return 1") == "    return 1"


def test_the_packages_problems_pass_with_their_own_solutions():
    problems = code._problems()
    assert len(problems) == 164
    for problem in problems[:8]:
        program = f"{problem['prompt']}{problem['canonical_solution']}\n{problem['test']}\n"
        assert passes(f"{program}check({problem['entry_point']})\n") == (True, ""), problem["task_id"]
