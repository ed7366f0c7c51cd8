"""``metrics.jsonl``: strict JSON, cut where a run goes on."""

import json

from tidar_megatron.training.metrics import JsonLines


def test_what_is_no_number_is_null(tmp_path):
    log = JsonLines(tmp_path / "metrics.jsonl")
    log.write(1, {"loss": float("nan"), "by_offset": [0.5, float("inf")], "steps": 3})
    log.close()

    def refuse(word):
        raise ValueError(word)

    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=refuse) == {
        "iteration": 1,
        "loss": None,
        "by_offset": [0.5, None],
        "steps": 3,
    }


def test_lines_behind_the_resumed_iteration_and_half_lines_go(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"iteration": 1}\n{"iteration": 2}\n{"iteration": 3}\n{"itera')
    JsonLines(path, resume_from=2).close()
    assert path.read_text() == '{"iteration": 1}\n{"iteration": 2}\n'
