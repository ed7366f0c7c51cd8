"""tidar generate-data: the model's own text, as it would write it alone, and the same shards whenever it was killed."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.programs import call
from tests.random_models import write_random_model
from tidar_megatron.data.shards import ShardedDocuments
from tidar_megatron.data.tokenizer import byte_tokenizer, save_tokenizer
from tidar_megatron.inference.engine import generate
from tidar_megatron.inference.loading import load_model
from tidar_megatron.inference.request import DecodeOptions, distinct_4grams
from tidar_megatron.inference.sampling import SamplingOptions
from tidar_megatron.own_text import varied_part

COUNT, HELD_OUT, NEW = 12, 3, 10


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with a model that writes bytes, and a file of prompts of 3 to 14 bytes."""
    folder = tmp_path_factory.mktemp("own")
    write_random_model(folder / "hf", kind="llama", tie=False)
    save_tokenizer(byte_tokenizer(), folder / "hf")
    (folder / "prompts.jsonl").write_text("".join(json.dumps("abcdefghijklmno"[: 3 + n]) + "\n" for n in range(COUNT)))
    return folder


def run(model, target, *more):
    paths = ["--output", target / "train", "--held-out-output", target / "valid"]
    given = ["--model", model / "hf", "--prompts", model / "prompts.jsonl", *paths, "--held-out", HELD_OUT]
    sizes = ["--max-new-tokens", NEW, "--batch-size", 5, "--dtype", "float32"]
    return call("tools/generate_data.py", *given, *sizes, *more)


def documents(folder):
    stored = ShardedDocuments(folder)
    return [stored[number][:].tolist() for number in range(len(stored))]


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_texts_are_those_of_the_engine(model, tmp_path, temperature):
    """Each prompt with what it would be continued by alone; the last prompts are held out."""
    done = run(model, tmp_path, "--temperature", temperature, "--seed", 7)
    assert done.returncode == 0, done.stderr
    assert f"training data: {COUNT - HELD_OUT} texts" in done.stdout
    alone = load_model(model / "hf", "cpu", "float32")
    wanted, marks = [], []
    for number, line in enumerate((model / "prompts.jsonl").read_text().splitlines()):
        prompt = list(json.loads(line).encode())
        sampling = SamplingOptions(temperature=temperature, seed=7 + number)
        text = prompt + generate(alone, prompt, DecodeOptions("ar", max_new_tokens=NEW, sampling=sampling)).token_ids
        text = text[: next((place for place, token in enumerate(text) if token > 256), len(text))]  # rows of padding
        own = [place >= len(prompt) for place in range(len(text))]
        wanted.append(text if text[-1] == 256 else [*text, 256])
        marks.append(own if text[-1] == 256 else [*own, False])
    assert documents(tmp_path / "train") + documents(tmp_path / "valid") == wanted
    stored = [ShardedDocuments(tmp_path / name) for name in ("train", "valid")]
    assert [each[n].supervised(0, 99).tolist() for each in stored for n in range(len(each))] == marks


@given(tokens=st.lists(st.integers(0, 2), max_size=40), least=st.floats(0, 1))
def test_a_text_is_cut_where_it_repeats_itself(tokens, least):
    kept = [n for n in range(len(tokens) + 1) if distinct_4grams(tokens[:n]) >= least]
    assert varied_part(tokens, least) == tokens[: max(kept)]


def test_the_least_variety_cuts_the_texts_of_a_run(model, tmp_path):
    assert run(model, tmp_path / "all").returncode == 0
    assert run(model, tmp_path / "varied", "--min-distinct", 1).returncode == 0
    for whole, cut in zip(documents(tmp_path / "all" / "train"), documents(tmp_path / "varied" / "train"), strict=True):
        assert cut[:-1] == whole[: len(cut) - 1]


def test_a_run_that_was_killed_at_once_goes_on(model, tmp_path):
    assert run(model, tmp_path).returncode == 0
    whole = (tmp_path / "train.jsonl").read_text()
    (tmp_path / "train.jsonl").write_text(whole[:30])
    assert run(model, tmp_path, "--overwrite").returncode == 0
    assert (tmp_path / "train.jsonl").read_text() == whole


def test_a_killed_run_goes_on(model, tmp_path):
    """After some texts and half a line; nothing is generated twice, and the shards are the same."""
    assert run(model, tmp_path / "whole").returncode == 0
    record = (tmp_path / "whole" / "train.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / "train.jsonl").write_text("".join(record[:5]) + record[5][:20])
    done = run(model, tmp_path / "killed")
    assert done.returncode == 0 and "4 of 12 texts are there already" in done.stderr
    lines = (tmp_path / "killed" / "train.jsonl").read_text().splitlines()
    assert lines[:5] == [line.rstrip("\n") for line in record[:5]] and len(lines) == 1 + COUNT
    for name in ("train", "valid"):
        assert documents(tmp_path / "killed" / name) == documents(tmp_path / "whole" / name)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--max-new-tokens", 0], "--max-new-tokens 0: must be at least 1"),
        (["--held-out", 0], "--held-out and --held-out-output go together"),
        (["--held-out", COUNT], "leaves none of 12 prompts to train on"),
        (["--limit", 0], "--limit 0: must be at least 1"),
        (["--temperature", -1], "temperature -1"),
        (["--min-distinct", 1.5], "--min-distinct 1.5: is a fraction of a text's 4-grams; give 0 to 1"),
        (["--prompts", "/nowhere"], "/nowhere: cannot be read"),
    ],
)
def test_bad_input_is_one_line(model, tmp_path, more, message):
    done = run(model, tmp_path, *more)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_a_record_of_another_run_is_kept(model, tmp_path):
    assert run(model, tmp_path).returncode == 0
    before = (tmp_path / "train.jsonl").read_bytes()
    done = run(model, tmp_path, "--overwrite", "--max-new-tokens", 11)
    assert done.returncode == 2 and "was begun with other options" in done.stderr
    for other in (b"[1\n", b'"one"\n"two"\n"three"', b'{"prompt": "x"}'):  # a file of the user's, which stays as it is
        (tmp_path / "train.jsonl").write_bytes(other)
        done = run(model, tmp_path, "--overwrite")
        assert done.returncode == 2 and "is not a record of own text" in done.stderr
        assert (tmp_path / "train.jsonl").read_bytes() == other
    (tmp_path / "train.jsonl").write_bytes(before)
    assert run(model, tmp_path, "--overwrite").returncode == 0
    assert (tmp_path / "train.jsonl").read_bytes() == before
