"""lm-eval by our engine: the numbers of its own ``hf`` model; drafting changes no score; bad files are refused."""

import copy
import dataclasses
import functools
import json
import sys
import time

import pytest
import torch

from tests.programs import call
from tests.random_models import write_random_model
from tidar_megatron.data.tokenizer import byte_tokenizer
from tidar_megatron.errors import UserError
from tidar_megatron.evaluation import tasks
from tidar_megatron.evaluation.tasks import gained, local_task, run_tasks
from tidar_megatron.inference.engine import generate_batch
from tidar_megatron.inference.loading import load_model
from tidar_megatron.inference.planner import planner_of
from tidar_megatron.inference.request import parse_plan

TEXTS = ["alpha beta gamma", " delta", "epsilon, zeta! " * 12, "x"]


@pytest.fixture(scope="module", autouse=True)
def _lm_eval_reads_its_tasks_once():
    """Its index of thousands of YAML files takes ten seconds each time; what it says of the machine starts programs."""
    import lm_eval.evaluator
    import lm_eval.tasks

    manager = functools.cache(lm_eval.tasks.TaskManager)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm_eval.tasks, "TaskManager", lambda **unused: manager())
        patch.setattr(lm_eval.evaluator, "add_env_info", lambda results: None)
        patch.setattr(lm_eval.evaluator, "get_git_commit_hash", lambda: None)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random model that can draft, with a byte tokenizer."""
    folder = tmp_path_factory.mktemp("model") / "hf"
    write_random_model(folder, "llama", tie=False)
    config = json.loads((folder / "config.json").read_text())
    config["tidar"] = {"mask_token_id": 257, "block_size": 4}
    (folder / "config.json").write_text(json.dumps(config))
    byte_tokenizer().save_pretrained(str(folder))
    return folder


def instances(kind, arguments):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, given, n, ("task", n, 1)) for n, given in enumerate(arguments)]


def test_likelihoods_are_those_of_lm_evals_own_model(folder):
    """Also of texts beyond the context (128 tokens), of empty contexts, and where a space moves to the continuation."""
    from lm_eval.models.huggingface import HFLM

    from tidar_megatron.evaluation.lm_eval_model import TidarLM

    ours = TidarLM(str(folder), batch_size=4)
    theirs = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=1)
    pairs = [(a, b) for a in ("", *TEXTS, "trailing space ") for b in (TEXTS[1], TEXTS[3], "abc")]
    pairs += [("long " * 30, "and on"), ("alpha", TEXTS[0])]
    for ours_one, theirs_one in zip(
        ours.loglikelihood(instances("loglikelihood", pairs)),
        theirs.loglikelihood(instances("loglikelihood", pairs), disable_tqdm=True),
        strict=True,
    ):
        assert ours_one[0] == pytest.approx(theirs_one[0], abs=1e-4)
        assert ours_one[1] == theirs_one[1]
    rolling = [(text,) for text in (*TEXTS, "word " * 80)]
    assert ours.loglikelihood(instances("loglikelihood", [("alpha", "x" * 128)]))  # the context is dropped
    with pytest.raises(UserError, match=r"the continuation to score has 129 tokens.* context holds 128: shorten 'xx"):
        ours.loglikelihood(instances("loglikelihood", [("alpha", "x" * 129)]))
    found = ours.loglikelihood_rolling(instances("loglikelihood_rolling", rolling))
    should = theirs.loglikelihood_rolling(instances("loglikelihood_rolling", rolling), disable_tqdm=True)
    assert found == pytest.approx(should, abs=1e-4, rel=1e-6)


@pytest.mark.slow
def test_text_is_that_of_lm_evals_own_model_whatever_the_plan(folder):
    from lm_eval.models.huggingface import HFLM

    from tidar_megatron.evaluation.lm_eval_model import TidarLM

    asked = [
        (text, {"until": until, "max_gen_toks": n, "do_sample": False})
        for text, until, n in [("alpha", ["\n\n"], 12), ("beta gamma", ["e"], 20), ("delta", [], 5), ("x" * 125, [], 9)]
    ]
    never_masks = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=1)
    never_masks.model.generation_config.suppress_tokens = [257]
    should = never_masks.generate_until(instances("generate_until", asked), disable_tqdm=True)
    for plan in ("ar", "auto", "2:4", "linear:4"):
        lm = TidarLM(str(folder), plan, batch_size=2)
        assert lm.generate_until(instances("generate_until", asked)) == should
        assert len(lm.generations["task"]) == 4


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    kinds = {
        "choices": [
            {
                "context": f"Question {n}: alpha or beta?",
                "choices": [" alpha", " beta", " gamma gamma"],
                "answer": n % 3,
            }
            for n in range(6)
        ],
        "texts": [{"text": "alpha beta gamma " * n} for n in range(1, 5)],
        "answers": [{"prompt": f"{n} and {n} is", "target": str(2 * n), "until": ["\n", " "]} for n in range(5)],
    }
    for name, lines in kinds.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.mark.slow
def test_local_tasks_by_a_plan_and_by_ar(folder, files):
    model = load_model(folder)
    names = [str(files / f"{name}.jsonl") for name in ("choices", "texts", "answers")]
    rows = {row["task"]: row for row in run_tasks(model, names, "2:4", batch_size=2, max_new_tokens=8)}
    assert {*rows} == {"choices", "texts", "answers"}
    for row in rows.values():
        assert row["scores"] == row["ar_scores"]
        assert not row["scores_differ"]
    assert {"acc", "acc_norm"} <= {*rows["choices"]["scores"]}
    assert rows["texts"]["scores"]["bits_per_byte"] > 1
    assert rows["answers"]["scores"]["exact_match"] in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    assert rows["answers"]["tokens_per_forward"] >= 1
    assert "tokens_per_forward" not in rows["choices"]
    # the multiple choice by hand: the likeliest of the three
    causal_lm = load_model(folder, keep_weights=True).causal_lm
    causal_lm.set_attn_implementation("sdpa")
    right = 0
    for line in map(json.loads, (files / "choices.jsonl").read_text().splitlines()):
        scores = []
        for choice in line["choices"]:
            context, rest = ([*text.encode()] for text in (line["context"], choice))
            with torch.no_grad():
                logits = causal_lm(torch.tensor([context + rest])).logits[0, len(context) - 1 : -1].log_softmax(-1)
            scores.append(logits.gather(-1, torch.tensor(rest)[:, None]).sum().item())
        right += scores.index(max(scores)) == line["answer"]
    assert rows["choices"]["scores"]["acc"] == pytest.approx(right / 6)


@pytest.mark.slow
def test_options_of_a_task_are_served_or_refused(folder):
    from lm_eval.models.huggingface import HFLM

    from tidar_megatron.evaluation.lm_eval_model import TidarLM

    hf = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=1)
    hf.model.generation_config.suppress_tokens = [257]
    plain = {"until": ["\n\n"], "max_gen_toks": 90, "do_sample": False}
    asked = [("alpha", plain | {"repetition_penalty": 5.0})]
    lm = TidarLM(str(folder), "2:4")
    found = lm.generate_until(instances("generate_until", asked))
    assert found == hf.generate_until(instances("generate_until", asked), disable_tqdm=True)
    assert found != lm.generate_until(instances("generate_until", [("alpha", plain)]))
    assert not lm.sampled
    with pytest.raises(UserError, match="num_beams is not supported"):
        lm.generate_until(instances("generate_until", [("alpha", plain | {"num_beams": 4})]))
    for options, said in (
        ({"temperature": 0.0}, "do_sample at temperature 0"),
        ({"top_p": 0.0}, "top-p 0.0: must be above 0"),
        ({"repetition_penalty": 0}, "repetition penalty 0.0: must be"),
    ):
        with pytest.raises(UserError, match=said):
            lm.generate_until(instances("generate_until", [("alpha", plain | {"do_sample": True} | options)]))
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        asked_for = plain | {"do_sample": True, "temperature": 1.0, "num_beams": 1, "top_p": False}
        both = [(text, asked_for) for text in ("alpha", "alpha")]
        drawn.append(lm.generate_until(instances("generate_until", both)))
    assert drawn[0] == drawn[1] != drawn[2]
    assert drawn[0][0] != drawn[0][1]  # of one prompt, but each for itself
    assert lm.sampled == {"task"}


def test_blanks_around_a_target_and_scores_that_are_no_numbers_are_no_difference(folder, tmp_path, monkeypatch):
    from tidar_megatron.evaluation import lm_eval_model

    (tmp_path / "task.jsonl").write_text('{"prompt": "a", "target": " b "}\n{"prompt": "c", "target": "d"}\n')
    answers = {"a": "b", "c": " d"}
    monkeypatch.setattr(
        lm_eval_model.TidarLM, "generate_until", lambda self, given, **_: [answers[one.doc["prompt"]] for one in given]
    )
    (row,) = run_tasks(load_model(folder), [str(tmp_path / "task.jsonl")], "2:4", max_new_tokens=4)
    assert row["scores"]["exact_match"] == 1.0
    nothing = {"p,none": float("nan")}
    assert not tasks._row("x", nothing, nothing, [], [])["scores_differ"]
    assert tasks._row("x", nothing, {"p,none": 1.0}, [], [])["scores_differ"]


def test_scores_that_differ_are_told(folder, files, monkeypatch):
    """A drafter that verifies nothing is seen in the scores' row."""
    from tidar_megatron.evaluation import lm_eval_model

    real = lm_eval_model.TidarLM.generate_until

    def forged(self, requests, disable_tqdm=False):
        texts = real(self, requests, disable_tqdm)
        return [request.doc["target"] for request in requests] if self._options.mode != "ar" else texts

    monkeypatch.setattr(lm_eval_model.TidarLM, "generate_until", forged)
    (row,) = run_tasks(load_model(folder), [str(files / "answers.jsonl")], "2:4", max_new_tokens=4)
    assert row["scores"]["exact_match"] == 1.0
    assert row["scores_differ"]


def test_the_tool(folder, files):
    named = [files / "answers.jsonl", files / "texts.jsonl"]
    options = ["--plan", "1:4", "--max-new-tokens", "6", "--json"]
    done = call("tools/evaluate.py", "--model", folder, "--tasks", *named, *options)
    assert done.returncode == 0, done.stderr
    assert "dtype: float32 (auto: " in done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    rows = found["rows"]
    assert found["dtype"] == "float32"
    assert [(row["task"], row["scores_differ"]) for row in rows] == [("answers", False), ("texts", False)]
    assert f" {rows[1]['scores']['bits_per_byte']:.4f} " in done.stdout
    perplexity = rows[1]["scores"]["word_perplexity"]  # of a random model: beyond what four places are good for
    assert perplexity > 1e6
    assert f" {perplexity:.3e} " in done.stdout
    assert "[Task:" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"context": "a"}\n', "one of these sets of keys"),
        ("", "is empty"),
        ("[1]\n", "the first line is not"),
        ('{"text": "a"}\n{"context": "a"}\n', "the first line has text, others do not"),
        ('{"text": "a"}\nno json\n', "line 2 is not JSON"),
        ('{"text": "a"}\n{"text": ""}\n', "line 2: text is empty"),
        ('{"prompt": 7, "target": "b"}\n', "line 1: prompt 7 is not a string"),
        ('{"prompt": "a", "target": "b", "until": null}\n', "line 1: until None is not a list of non-empty strings"),
        (
            '{"context": "a", "choices": ["b", ""], "answer": 0}\n',
            "line 1: choices .* is not a list of non-empty strings",
        ),
        ('{"context": "a", "choices": ["b", "c"], "answer": 2}\n', "line 1: answer 2 is not an index of its choices"),
        ('{"prompt": "a", "target": "b"}\n{"prompt": "a", "target": "b", "until": ["."]}\n', "differ in 'until'"),
    ],
)
def test_files_that_are_no_task(tmp_path, content, said):
    (tmp_path / "task.jsonl").write_text(content)
    with pytest.raises(UserError, match=said):
        local_task(tmp_path / "task.jsonl")
    with pytest.raises(UserError, match="No such file"):
        local_task(tmp_path / "none.jsonl")


def test_texts_that_look_like_python_are_texts(folder, tmp_path):
    """lm-eval reads what a template gives as numbers and lists where it can."""
    from lm_eval.tasks import TaskManager, get_task_dict

    def made(*lines):
        (tmp_path / "task.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (task,) = get_task_dict([local_task(tmp_path / "task.jsonl")], TaskManager()).values()
        return task, [*task.test_docs()]

    odd = ["[1, 2]", " 7", "['a']", "2018-01-22 12:12:53"]
    task, docs = made(*({"prompt": text, "target": text} for text in odd))
    assert [task.doc_to_text(doc) for doc in docs] == odd
    assert [task.doc_to_target(doc) for doc in docs] == [text.strip() for text in odd]
    task, docs = made(*({"text": text} for text in odd))
    assert [task.doc_to_target(doc) for doc in docs] == odd
    made({"text": "a", "context": 5, "until": None})  # what is of another kind is not looked at
    task, docs = made({"context": "12", "choices": ["3", "[4]"], "answer": 1})
    asked = [instance.args for instance in task.construct_requests(docs[0], "12", metadata=(None, 0, 1))]
    assert asked == [("12", "3"), ("12", "[4]")] and task.doc_to_text(docs[0]) == "12"


def test_a_task_that_is_no_yaml(folder, tmp_path):
    (tmp_path / "task.yaml").write_text("task: [broken")
    with pytest.raises(UserError, match=r"task\.yaml: is not YAML"):
        run_tasks(load_model(folder), [str(tmp_path / "task.yaml")])
    with pytest.raises(UserError, match=r"none\.yaml: No such file"):
        run_tasks(load_model(folder), [str(tmp_path / "none.yaml")])


def test_what_the_model_does_not_take_is_refused(folder):
    from tidar_megatron.evaluation import lm_eval_model

    with pytest.raises(UserError, match="model_args paln: unknown; use pretrained, plan"):
        lm_eval_model.TidarLM(str(folder), paln="ar")


def test_a_tokenizer_without_ends(folder, tmp_path):
    """Where it has a BOS alone, nothing but the task's own stops end a text; with neither, no text can begin."""
    from tidar_megatron.evaluation.lm_eval_model import TidarLM

    model = load_model(folder)
    model = dataclasses.replace(model, tokenizer=copy.deepcopy(model.tokenizer))
    model.tokenizer.bos_token, model.tokenizer.eos_token = model.tokenizer.eos_token, None
    asked = instances("generate_until", [("alpha", {"until": [], "max_gen_toks": 5})])
    assert TidarLM(model).generate_until(asked) == TidarLM(load_model(folder)).generate_until(asked)
    model.tokenizer.bos_token = None
    with pytest.raises(UserError, match=r"neither a BOS nor an EOS token.*tokenizer_config.json"):
        TidarLM(model)
    with pytest.raises(UserError, match="has no tokenizer: copy"):
        TidarLM(dataclasses.replace(model, tokenizer=None))


def test_lm_evals_own_command_line(folder, tmp_path):
    """As the README has it: no device is named, and none is a GPU."""
    (tmp_path / "texts.jsonl").write_text('{"text": "alpha beta"}\n')
    task = {key: value for key, value in local_task(tmp_path / "texts.jsonl").items() if key != "metric_list"}
    (tmp_path / "texts.yaml").write_text(json.dumps(task))
    command = ["tidar_megatron/evaluation/__main__.py", "--model", "tidar", "--limit", "1"]
    command += ["--tasks", tmp_path / "texts.yaml", "--model_args"]
    done = call(*command, f"pretrained={folder}")
    assert done.returncode == 0, done.stderr
    assert "word_perplexity" in done.stdout
    done = call(*command, f"pretrained={tmp_path}")
    assert (done.returncode, done.stderr.splitlines()[-1][:7]) == (2, "error: ")


@pytest.mark.slow
def test_the_warm_up_teaches_the_planner_nothing(folder):
    model = load_model(folder)
    before = planner_of(model)
    tasks.warm_up(model, "auto")
    assert planner_of(model) is not before


def test_names_that_are_no_task(folder):
    with pytest.raises(UserError, match="lm-eval has no such task"):
        run_tasks(load_model(folder), ["no_such_task_of_lm_eval"])


def test_two_tasks_of_one_name_are_refused(folder, tmp_path):
    for part in ("a", "b"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "valid.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(UserError, match="valid names two tasks"):
        run_tasks(load_model(folder), [str(tmp_path / part / "valid.jsonl") for part in ("a", "b")])


def test_a_line_is_one_whatever_is_in_it(tmp_path):
    (tmp_path / "task.jsonl").write_text('{"text": "a\u2028b"}\n', encoding="utf-8")
    assert local_task(tmp_path / "task.jsonl")["task"] == "task"


def test_seconds_of_a_batch_count_once(folder):
    model = load_model(folder)
    options = dataclasses.replace(parse_plan("ar"), max_new_tokens=12, ignore_eos=True)
    prompts = [[n + 65] * (n + 1) for n in range(4)]
    generate_batch(model, prompts, options, 4)
    start = time.perf_counter()
    made = generate_batch(model, prompts, options, 4)
    wall = time.perf_counter() - start
    assert sum(one.decode_share for one in made) <= wall < sum(one.decode_seconds for one in made)
    assert gained(made, made)["tokens_per_second"] >= sum(sum(one.emitted) for one in made) / wall


def test_without_lm_eval_it_is_said_what_to_install(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match="make eval, or pip install lm-eval"):
        run_tasks(load_model(folder), ["hellaswag"])


def test_a_prompt_must_have_room(folder):
    from tidar_megatron.evaluation.lm_eval_model import TidarLM

    lm = TidarLM(str(folder), max_length=64)
    with pytest.raises(UserError, match="leave no room for the prompt in the model's context of 64"):
        lm.generate_until(instances("generate_until", [("alpha", {"until": [], "max_gen_toks": 64})]))
