"""lm-eval's model of ours beside its ``hf`` model, with a tokenizer that merges: encodings, scores, task options."""

import json

import pytest

from tests.random_models import write_random_model
from tidar_megatron.data.tokenizer import train_bpe
from tidar_megatron.errors import UserError

MASK, EOS = 290, 289


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random model whose tokenizer has "hello", " wor" and " world" as one token each."""
    folder = tmp_path_factory.mktemp("model") / "hf"
    write_random_model(folder, "llama", tie=False, vocab_size=300, eos_token_id=EOS)
    config = json.loads((folder / "config.json").read_text())
    config["tidar"] = {"mask_token_id": MASK, "block_size": 4}
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = train_bpe(["hello world hello world the capital of France is Paris wor worl world "] * 20, EOS + 1)
    assert tokenizer.tokenize("hello world") == ["hello", "Ġworld"]
    assert tokenizer.tokenize("hello wor") == ["hello", "Ġwor"]
    tokenizer.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def ours(folder):
    from tidar_megatron.evaluation.lm_eval_model import TidarLM

    return TidarLM(str(folder), "ar", batch_size=4)


@pytest.fixture(scope="module")
def hf(folder):
    from lm_eval.models.huggingface import HFLM

    hf = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=1)
    hf.model.generation_config.suppress_tokens = [MASK]
    return hf


def instances(kind, arguments):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, given, n, ("task", 7, 1)) for n, given in enumerate(arguments)]


def compare(ours, hf, pairs, encoded):
    """The encodings, and the log-probabilities of both models for them."""
    assert [ours._to_score(*pair) for pair in pairs] == encoded
    found = ours.loglikelihood(instances("loglikelihood", pairs))
    requests = [(pair, *ids) for pair, ids in zip(pairs, encoded, strict=True)]
    for one, other in zip(found, hf._loglikelihood_tokens(requests, disable_tqdm=True), strict=True):
        assert one[0] == pytest.approx(other[0], abs=1e-4)
        assert one[1] == other[1]


CONTEXTS = ["", "hello wor", "hello wor ", "hello  ", "é", "日本", "<|endoftext|>", "a\n", "the capital\t"]
CONTINUATIONS = [" world", "k", " ", "ld k", "́x", "本語", "<|endoftext|>a", "\n"]


def test_encodings_and_scores_are_those_of_lm_evals_own_model(ours, hf, monkeypatch):
    pairs = [(context, continuation) for context in CONTEXTS for continuation in CONTINUATIONS]
    encoded = []
    with monkeypatch.context() as patch:
        patch.setattr(hf, "_loglikelihood_tokens", lambda requests, **_: encoded.extend(r[1:] for r in requests))
        hf.loglikelihood(instances("loglikelihood", pairs), disable_tqdm=True)
    compare(ours, hf, pairs, encoded)


def test_a_continuation_that_merges_into_its_context_is_encoded_alone(ours, hf, monkeypatch):
    """lm-eval 0.4.13 fails there, as of a context of blanks; its pull request 4055 encodes the continuation alone."""
    hello, wor, ld, spaces = (ours.tokenizer.encode(text) for text in ("hello", " wor", "ld", "   ld"))
    compare(ours, hf, [("hello wor", "ld"), ("   ", "ld")], [([*hello, *wor], ld), ([EOS], spaces)])
    # a tokenizer that merges over a space: the space belongs to the continuation, as where it does not merge
    monkeypatch.setattr(ours, "tok_encode", lambda text, **_: {"a": [1], "a b": [2], " b": [3]}[text])
    assert ours._to_score("a ", "b") == ([1], [3])


def test_what_cannot_be_scored_names_its_task_document_and_choice(ours):
    def refuse(said, *pair):
        with pytest.raises(UserError) as caught:
            ours.loglikelihood(instances("loglikelihood", [("a", "b"), pair]))
        assert str(caught.value).startswith(f"task task, document 7, continuation 1 {pair[1][:40]!r}: ")
        assert said in str(caught.value)

    refuse("there is no token to score", "hello", "")
    refuse("there is no token to score", "", "")
    refuse("there is no token to score", "", "<|endoftext|>")
    refuse("the continuation to score has 200 tokens", "hello", "z" * 200)


def test_an_id_beyond_the_model_names_its_document(ours, monkeypatch):
    monkeypatch.setattr(ours, "tok_encode", lambda text, **_: [5, 300])
    for call, kind, args in (
        (ours.loglikelihood, "loglikelihood", ("", "x")),
        (ours.loglikelihood_rolling, "loglikelihood_rolling", ("x",)),
        (ours.generate_until, "generate_until", ("x", {"max_gen_toks": 4})),
    ):
        with pytest.raises(UserError, match=r"task task, document 7.*: token id 300 is outside the model's vocabulary"):
            call(instances(kind, [args]))


BASE = {"max_gen_toks": 6, "do_sample": False}


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"until": "F"},
        {"until": ["F", "6"]},
        {"until": []},
        {"do_sample": None},
        {"do_sample": 0},
        {"max_gen_toks": "6"},
        {"max_gen_toks": 2.7},
        {"max_gen_toks": None, "max_new_tokens": 5},
        {"do_sample": None, "temperature": 0.0},
    ],
    ids=str,
)
def test_generation_options_do_what_they_do_to_lm_evals_own_model(ours, hf, asked):
    request = [("hello wor", BASE | asked)]
    should = hf.generate_until(instances("generate_until", request), disable_tqdm=True)
    assert ours.generate_until(instances("generate_until", request)) == should


@pytest.mark.parametrize("absent", ["until", "temperature", "max_new_tokens", "top_k"])
def test_an_option_that_is_none_is_one_that_is_left_out(ours, absent):
    """lm-eval's own model fails on the first two."""
    plain = ours._task_options(BASE)
    assert ours._task_options(BASE | {absent: None}) == plain
    drawn = {"do_sample": True, "temperature": 0.5, "max_gen_toks": 3}
    assert ours._task_options(drawn | {"top_k": None})[0].sampling.top_k == 50  # transformers' default


def test_what_the_folder_says_of_generation_holds_where_the_task_does_not(ours, hf, monkeypatch):
    request = [("hello wor", BASE | {"max_gen_toks": 60})]
    plain = ours.generate_until(instances("generate_until", request))
    for model in (hf.model, ours.model.causal_lm):
        monkeypatch.setattr(model.generation_config, "repetition_penalty", 5.0)
        monkeypatch.setattr(model.generation_config, "top_k", 7)
    found = ours.generate_until(instances("generate_until", request))
    assert found == hf.generate_until(instances("generate_until", request), disable_tqdm=True)
    assert found != plain
    drawn = {"do_sample": True, "temperature": 0.5, "max_gen_toks": 3}
    assert [ours._task_options(drawn | given)[0].sampling.top_k for given in ({}, {"top_k": 3})] == [7, 3]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"until": [None]}, "until [None] is not a list of texts"),
        ({"until": ["a", ""]}, "until ['a', ''] is not a list of texts"),
        ({"until": ""}, "until '' is not a list of texts"),
        ({"until": 3}, "until 3 is not a list of texts"),
        ({"max_gen_toks": "many"}, "max_gen_toks 'many' is not a number"),
        ({"max_gen_toks": float("inf")}, "max_gen_toks inf is not a number"),
        ({"max_gen_toks": 0}, "max new tokens 0: use a positive integer"),
        ({"max_gen_toks": 128}, "(max_gen_toks) leave no room for the prompt in the model's context of 128"),
        ({"temperature": "hot"}, "temperature 'hot' is not a number"),
        ({"top_p": [1]}, "top_p [1] is not a number"),
        ({"do_sample": "false"}, "do_sample 'false' is neither true nor false"),
        ({"max_length": 9}, "max_length is not supported"),
    ],
    ids=str,
)
def test_what_cannot_be_generated_names_its_task_and_document(ours, asked, said, monkeypatch):
    """And nothing was generated yet, of other documents either."""
    monkeypatch.setattr("tidar_megatron.evaluation.lm_eval_model.generate_batch", lambda *_: pytest.fail("generated"))
    with pytest.raises(UserError) as caught:
        ours.generate_until(instances("generate_until", [("hello", BASE), ("hello", BASE | asked)]))
    assert str(caught.value).startswith("task task, document 7: ")
    assert said in str(caught.value)
    with pytest.raises(UserError, match="document 7: the prompt is empty"):
        ours.generate_until(instances("generate_until", [("", BASE)]))


def test_the_log_says_what_dtype_auto_is(folder, monkeypatch):
    from tidar_megatron.evaluation import lm_eval_model

    said = []
    monkeypatch.setattr(lm_eval_model.LOGGER, "info", said.append)
    for dtype in ("float64", None, "auto"):
        lm_eval_model.TidarLM(str(folder), "ar", dtype=dtype)
    assert len(said) == 2 and all(line.startswith("dtype: float32 (auto: ") for line in said)
