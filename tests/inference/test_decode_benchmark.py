"""``tools/benchmark.py decode``: what it counts, on a model of seconds."""

import json

import pytest

from tests.programs import call
from tidar_megatron.benchmark import decode as decode_benchmark
from tidar_megatron.benchmark.decode import decode, measure, same_tokens, text_of
from tidar_megatron.benchmark.ways import Run
from tidar_megatron.inference.loading import load_model


def test_contexts_are_the_prompts_end_to_end():
    prompts = [[1, 2, 3], [4, 5], [6]]
    assert text_of(prompts, 2, 0) == [2, 3]
    assert text_of(prompts, 5, 0) == [4, 5, 1, 2, 3]
    assert text_of(prompts, 8, 1) == [4, 5, 1, 2, 3, 6, 4, 5]


def test_requests_are_interleaved_in_an_order_that_rotates(monkeypatch):
    """And each way decodes every group in every round, after one request to warm up."""
    monkeypatch.setattr(decode_benchmark, "REST", 0.0)
    calls = []

    def way(name):
        return lambda texts: calls.append((name, texts[0][0])) or Run([[1, 2]], 1, 0.1, None)

    done = measure({name: way(name) for name in "abc"}, [[[0]], [[1]]], 2, None)
    assert calls[:3] == [("a", 0), ("b", 0), ("c", 0)]
    assert ["".join(name for name, _ in calls[at : at + 3]) for at in (3, 6, 9, 12)] == ["abc", "bca", "cab", "abc"]
    assert [number for _, number in calls[3::3]] == [0, 1, 0, 1]
    assert all(len(requests) == 4 and requests[0].joules is None for requests in done.values())


def test_the_share_of_tokens_that_are_the_same():
    assert same_tokens([[1, 2, 3, 4], [5, 6, 7, 8]], [[1, 2, 3, 4], [5, 0, 7, 8]]) == 5 / 8


@pytest.mark.slow
def test_rows(checkpoint):
    model = load_model(checkpoint)
    prompts = [list(b"hello world"), list(b"another one")]
    assistant = load_model(checkpoint, keep_weights=True).causal_lm
    assistant.set_attn_implementation("sdpa")
    found = decode(model, checkpoint, prompts, [16, 4096], [1, 2], 12, 1, assistant)
    assert found["skipped"] == [4096]
    rows = {(row["mode"], row["plan"], row["batch"]): row for row in found["rows"]}
    for batch in (1, 2):
        ours = {plan for mode, plan, b in rows if b == batch and mode not in ("transformers", "llama.cpp")}
        assert ours == {"ar", "lookup", "auto", "all", "1", "2", "linear"}
        assert rows["ar", "ar", batch]["over_ar"] == rows["ar", "ar", batch]["tokens_per_forward"] == 1.0
        assert rows["transformers", "generate", batch]["tokens_per_forward"] == 1.0
        assert all(rows["ar", "ar", batch]["spread"][name] == 1.0 for name in ("low", "median", "high"))
        if found["settings"]["energy"].startswith("computed"):  # AR's and generate's forwards are the same
            of_ar, of_generate = rows["ar", "ar", batch], rows["transformers", "generate", batch]
            assert of_ar["computed_megabytes_per_token"] > 0
            if batch == 1:  # two texts are padded
                for name in ("computed_megabytes_per_token", "computed_gigaflops_per_token"):
                    assert of_ar[name] == of_generate[name]
    assert ("transformers", "prompt-lookup", 1) in rows and ("transformers", "prompt-lookup", 2) not in rows
    assert ("llama.cpp", "float32", 1) in rows or found["left_out"]
    for row in rows.values():
        if row["mode"] == "llama.cpp":
            assert row["plan"].startswith("Q") is (row["identical_to_ar"] is None)
            continue
        assert row["same_tokens"] == 1.0
        assert row["identical_to_ar"] and row["ties"] == row["different"] == 0 and row["context"] == 16
        assert row["tokens_per_second"] > 0 and row["peak_bytes"] > 0 and 0 < row["distinct_4grams"] <= 1
        assert row["first_token_seconds"] > 0 and row["decode_tokens_per_second"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "decode: needs --model DIR and --prompts FILE"),
        (["--model", "x", "--prompts", "y", "--contexts", "0"], "--contexts 0: must be at least 1"),
        (["--model", "x", "--prompts", "nowhere"], "nowhere: cannot be read"),
        (["--seq-lengths", "256"], "--seq-lengths: is for"),
    ],
)
def test_bad_input(arguments, message, tmp_path):
    done = call("tools/benchmark.py", "decode", *arguments, "--output", tmp_path)
    assert done.returncode == 2 and message in done.stderr, done.stderr[-2000:]


@pytest.mark.slow
def test_the_program(checkpoint, tmp_path):
    (tmp_path / "prompts.jsonl").write_text('"hello"\n"abc"\n')
    command = ["tools/benchmark.py", "decode", "--model", checkpoint]
    command += ["--prompts", tmp_path / "prompts.jsonl"]
    more = ["--contexts", 16, "--batch-sizes", 1, "--max-new-tokens", 6, "--repeats", 1, "--output", tmp_path, "--json"]
    done = call(*command, *more)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert json.loads((tmp_path / "decode.json").read_text()) == result
    wanted = {"mode", "plan", "batch", "context", "tokens_per_forward", "tokens_per_second", "over_ar"}
    assert all(wanted <= row.keys() for row in result["rows"])
