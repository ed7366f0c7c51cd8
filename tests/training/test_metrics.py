"""``metrics.jsonl``: strict JSON, cut where a run goes on. The console: its lines, its progress bar, the time left."""

import io
import json

import pytest
from rich.console import Console

from tidar_megatron.config import build_config
from tidar_megatron.training import metrics
from tidar_megatron.training.metrics import JsonLines, MetricsLogger, clock, seconds_left


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


def steps(*iterations, resume_from=0, console=None, monkeypatch=None):
    """The text on the console of a run of 100 steps that logs the given ones; half of the run is AR warm-up."""
    out = io.StringIO()
    monkeypatch.setattr(metrics, "Console", lambda **options: Console(**options, file=out, **(console or {})))
    training = {"train_iters": 100, "global_batch_size": 1, "micro_batch_size": 1}
    tidar = {"block_size": 8, "ar_warmup_fraction": 0.5}
    config = build_config(
        {"training": training, "tidar": tidar, "logging": {"log_interval": 5, "console_interval": 20}}
    )
    logger = MetricsLogger(config, True, resume_from)
    for iteration in iterations:
        logger.training(
            iteration,
            {
                "phase": "joint", "ar_loss": 1.25, "diffusion_loss": 2.5, "learning_rate": 1e-3, "grad_norm": 1.0,
                "clean_tokens_per_second": 10.0, "step_seconds": 2.0, "memory_gib": 0.5, "skipped_iterations": 0,
                "seconds_left": 2.0 * (100 - iteration),
            },
        )  # fmt: skip
    logger.close()
    return out.getvalue()


def test_the_console_has_fewer_lines_than_the_record(monkeypatch):
    lines = steps(*range(5, 101, 5), monkeypatch=monkeypatch).splitlines()
    assert [line.split()[1] for line in lines] == ["20/100", "40/100", "60/100", "80/100", "100/100"]
    assert lines[0].endswith("| 2:40 left")
    assert "left" not in lines[-1]
    lines = steps(65, 70, 85, 90, 97, resume_from=60, monkeypatch=monkeypatch).splitlines()
    assert [line.split()[1] for line in lines] == ["85/100"]


def test_a_terminal_has_a_progress_bar(monkeypatch):
    shown = steps(5, 10, console={"force_terminal": True, "force_interactive": True}, monkeypatch=monkeypatch)
    assert "10/100" in shown
    assert "AR 1.250, diffusion 2.500" in shown
    assert "3:00 left" in shown
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")  # the cursor is there again


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_the_time_left_counts_tokens(fraction):
    """A step of the warm-up has 64 tokens, a joint step 128, or 96 with masks in half of the blocks."""
    config = build_config(
        {
            "training": {"train_iters": 100},
            "data": {"seq_length": 64},
            "tidar": {"block_size": 8, "ar_warmup_fraction": 0.3, "diffusion_block_fraction": fraction},
        }
    )
    joint = 1 + fraction
    assert seconds_left(config, 10, 2.0) == pytest.approx(20 * 2 + 70 * 2 * joint)
    assert seconds_left(config, 30, 2.0) == pytest.approx(70 * 2 * joint)
    assert seconds_left(config, 40, 2.0) == pytest.approx(60 * 2)
    assert seconds_left(config, 100, 2.0) == 0


def test_clock():
    assert [clock(s) for s in (0.4, 65, 3599.6, 3 * 3600 + 62)] == ["0:00", "1:05", "1:00:00", "3:01:02"]
