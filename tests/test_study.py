"""What the studies conclude: means, paired differences, intervals; and that a command is a variant's."""

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tidar_megatron.errors import UserError

sys.path.insert(0, str(ROOT / "examples" / "study"))
import study
from variants import BASE, STUDIES

sys.path.pop(0)


def test_intervals_are_students():
    """Of 1, 2, 3 the standard error is 1 / sqrt(3), and t at 2 degrees of freedom 4.303."""
    found = study.interval([1.0, 2.0, 3.0])
    assert found == {"mean": 2.0, "half": pytest.approx(4.303 / 3**0.5), "n": 3}
    assert study.interval([7.0]) == {"mean": 7.0, "half": None, "n": 1}


def test_a_variant_is_compared_with_the_base_of_the_same_seed(tmp_path):
    """Seeds differ by 10, the variant from its base by 1: the difference is exact, the means are not."""
    args = argparse.Namespace(runs=tmp_path, study="study")
    wanted = [("cities", name, seed) for seed in range(3) for name in (BASE, "B = 4")]
    for corpus, name, seed in wanted:
        folder = study.folder_of(args, corpus, name, seed, 30)
        folder.mkdir(parents=True)
        value = 10.0 * seed + (name != BASE)
        decoded = {"tokens_per_forward": value, "distinct_4grams": 1.0, "ar_nats_per_token": 2.0}
        result = dict.fromkeys(("ar_loss", "diffusion_loss", "expected_tokens_per_forward"), value)
        (folder / "result.json").write_text(json.dumps({**result, "trust 1": decoded, "trust 0.5": decoded}))
    found = study.collect(args, STUDIES["study"], wanted, 30)
    base, other = found["rows"]
    assert base["ar_loss"]["mean"] == 10.0
    assert base["ar_loss"]["half"] > 20
    assert other["ar_loss, over base"] == {"mean": 1.0, "half": 0.0, "n": 3}
    assert other["tokens_per_forward, trust 0.5, over base"]["mean"] == 1.0
    tokens = "11.00 ± 24.84 | 1.00 ± 0.00"
    assert f"| cities | B = 4 | 11.000 ± 24.843 | 1.000 ± 0.000 | {tokens} | {tokens} |" in study.table(found)
    assert "| cities | 0.5 | 10.00 ± 24.84 | 2.00 ± 0.00 | 1.00 ± 0.00 |" in study.trust_table(found)
    study.draw(found, tmp_path / "study.png")
    assert (tmp_path / "study.png").stat().st_size > 10_000


def test_a_result_of_another_recipe_is_made_anew(tmp_path, monkeypatch):
    """Programs are stood in for: of interest is which runs they are started for, and that a failure ends the study."""
    for part in ("train", "valid"):
        (tmp_path / "data/cities" / part).mkdir(parents=True)
        (tmp_path / "data/cities" / part / "manifest.json").write_text(part)
    started = []

    def run(command, **kwargs):
        started.append(command[1])
        if command[1] == "examples/study/measure.py":
            (Path(command[2]) / "result.json").write_text("{}")
        return argparse.Namespace(returncode=0)

    monkeypatch.setattr(study.subprocess, "run", run)
    args = argparse.Namespace(runs=tmp_path / "runs", data=tmp_path / "data", study="study")

    def programs(which, steps=30):
        started.clear()
        study.train(args, which, "cities", BASE, 0, steps)
        return len(started)

    paper = STUDIES["study"]
    assert [programs(paper), programs(paper)] == [3, 0]
    assert [programs(dataclasses.replace(paper, prompts=1)), programs(paper), programs(paper)] == [3, 3, 0]
    assert programs(dataclasses.replace(paper, flags=paper.flags | {"lr": 1.0})) == 3
    assert programs(paper) == 3
    (tmp_path / "data/cities/valid/manifest.json").write_text("other data")
    assert [programs(paper), programs(paper)] == [3, 0]


def test_a_study_ends_with_the_first_run_that_fails(tmp_path, monkeypatch):
    started = []

    def train(args, which, corpus, name, seed, steps):
        started.append(name)
        time.sleep(0.2)
        raise UserError("no")

    monkeypatch.setattr(study, "prepare", lambda folder, names: None)
    monkeypatch.setattr(study, "train", train)
    monkeypatch.setattr(sys, "argv", ["study.py", "--jobs", "1", "--runs", str(tmp_path)])
    with pytest.raises(UserError, match="no"):
        study.main()
    assert len(started) <= 3  # of 66


@pytest.mark.parametrize("name", list(STUDIES))
def test_every_variant_is_a_command_of_its_own(name):
    """And one that tools/pretrain.py takes."""
    from tidar_megatron.config import parse_config

    commands = []
    for variant in STUDIES[name].variants:
        flags = STUDIES[name].command(variant, 40, 1)
        config = parse_config(flags[len(STUDIES[name].variants[variant].trainer) :])
        assert config.tidar.block_size == STUDIES[name].block_size(variant)
        assert config.training.seed == 1
        commands.append(tuple(flags))
    assert len({*commands}) == len(commands)
