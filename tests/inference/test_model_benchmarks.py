"""``tools/benchmark.py planner`` and ``step``: what they compare, on models of seconds; bodies that say the same."""

import dataclasses
import importlib.util
import json

import pytest
import torch

from tests.conftest import THOROUGH
from tests.inference.conftest import make_causal_lm
from tests.programs import call
from tidar_megatron.benchmark import bodies, planner
from tidar_megatron.benchmark.bodies import grown, with_useless_drafts
from tidar_megatron.benchmark.measuring import allocated_bytes
from tidar_megatron.benchmark.slots import TOKENS
from tidar_megatron.benchmark.step import step
from tidar_megatron.errors import UserError
from tidar_megatron.inference.cache import rounded_keys
from tidar_megatron.inference.engine import Engine, generate
from tidar_megatron.inference.forward import ForwardLayout, Part, Rows
from tidar_megatron.inference.lean import use_lean_forward
from tidar_megatron.inference.loading import load_model
from tidar_megatron.inference.products import Product
from tidar_megatron.inference.request import DecodeOptions, parse_plan
from tidar_megatron.inference.static import Forwards
from tidar_megatron.inference.wrapping import wrap_model

PRODUCTS = ("qkv", "output", "gate_up", "down")
SMALL = {"hidden_size": 64, "intermediate_size": 80, "num_attention_heads": 8, "num_hidden_layers": 3}


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_larger_body_says_the_same(family, monkeypatch):
    monkeypatch.setitem(bodies.BODIES, "small", SMALL)
    model = wrap_model(make_causal_lm(family, torch.float64, rms_norm_eps=1e-12))
    larger = grown(model, "small")
    count = [sum(p.numel() for p in m.causal_lm.parameters()) for m in (model, larger)]
    assert count[1] > 3 * count[0]
    ids = torch.randint(0, 47, (2, 30))
    logits = []
    for wrapped in (model, larger):
        wrapped.causal_lm.set_attn_implementation("eager")
        logits.append(wrapped.causal_lm(ids).logits)
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-5)  # norms are float32 whatever the dtype


def test_a_body_must_be_larger(trained, monkeypatch):
    monkeypatch.setitem(bodies.BODIES, "11M", SMALL | {"hidden_size": 8})
    with pytest.raises(UserError, match="--bodies 11M: the model is larger"):
        grown(trained, "11M")


@pytest.mark.slow
def test_useless_drafts_change_no_text_and_are_not_accepted(trained, prompts):
    useless = with_useless_drafts(trained)
    forwards = {}
    for name, model in (("trained", trained), ("useless", useless)):
        made = [generate(model, prompt, DecodeOptions("tidar", max_new_tokens=40)) for prompt in prompts]
        plain = [generate(model, prompt, DecodeOptions("ar", max_new_tokens=40)) for prompt in prompts]
        assert [g.token_ids for g in made] == [g.token_ids for g in plain]
        forwards[name] = sum(g.forwards for g in made)
    assert forwards["useless"] > 1.5 * forwards["trained"]


@pytest.mark.skipif(not THOROUGH, reason="takes 7 s: make test-slow runs it, and .ci/run the program itself")
def test_the_planner_against_every_plan(trained, prompts, monkeypatch):
    monkeypatch.setattr(planner, "LENGTHS", (2, 4))
    threads = torch.get_num_threads()
    found = planner.planner(trained, prompts, [("own", 1), ("useless", 1)], [], [1, 2], 8, 2)
    assert [(row["body"], row["batch"]) for row in found["compared"]] == [
        (body, batch) for body in ("own", "useless") for batch in (1, 2)
    ]
    plans = {row["plan"] for row in found["sweep"] if row["body"] == "own"}
    assert plans == {"ar", *(f"{kind}:{K}" for kind in planner.KINDS for K in (2, 4)), "3:4"} - {"2:2", "3:2"}
    for row in found["compared"]:
        assert row["best"] in plans and row["auto_over_best"]["median"] > 0 and row["requests"] >= 2
    ar = next(row for row in found["sweep"] if row["plan"] == "ar")
    assert ar["tokens_per_forward"] == 1.0
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_a_step_against_a_bare_forward(checkpoint):
    model = load_model(checkpoint)
    found = step(model, checkpoint, [list(b"hello world")], [16, 40, 4096], 6, 2)
    assert found["skipped"] == [4096]
    assert {row["context"] for row in found["rows"]} == {16, 40} and len(found["rows"]) == 2 * 6
    for row in found["rows"]:
        assert row["over_bare"]["median"] > 0 and row["bytes_per_step"] > 0 and row["tokens_per_step"] >= 1
        assert row["context"] > 16 or row["over_nearest"] == row["bare_over_nearest"] == 1.0


@pytest.mark.parametrize("plan", ["ar", "linear:4", "1:4", "all:4"])
@pytest.mark.parametrize("batch", [1, 3])
def test_bytes_of_a_step_do_not_grow_with_the_context(causal_lm, plan, batch):
    """Steps of as many tokens take as many bytes behind 600 tokens as behind 1900 (fewer than the 512 that
    a kernel goes through at a time make its room smaller), kernels' own included; but for a batch's mask, once."""
    model = wrap_model(causal_lm("llama", torch.float32, max_position_embeddings=2048))
    options = parse_plan(plan)
    taken = {}
    for context in (600, 1900):
        engine = Engine(model, batch, 2040)
        asked = DecodeOptions(**{**vars(options), "max_new_tokens": 30, "ignore_eos": True})
        sequences = [engine.submit([1 + number] * context, asked) for number in range(batch)]
        while any(sequence.reads_prompt for sequence in sequences):
            engine.step()
        engine.step()
        by_size = taken.setdefault(context, {})
        while not engine.is_idle:
            made = []
            size = allocated_bytes(lambda engine=engine, made=made: made.extend(engine.step()))
            if len(made) == batch:
                key = tuple(sequence.last_part.layout for sequence, _ in made)
                by_size[key] = min(size, by_size.get(key, size))
    same = taken[600].keys() & taken[1900].keys()
    assert same
    for key in same:
        most = max(layout.num_tokens for layout in key)
        mask = batch * (Rows.of(2, most, torch.device("cpu")).padded * 4 + 1) + 8  # bytes per key
        more = mask * (rounded_keys(1940) - rounded_keys(601)) if batch > 1 else 0
        assert taken[1900][key] <= taken[600][key] * 1.02 + more, key


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["planner"], "planner: needs --model DIR and --prompts FILE"),
        (["training", "--contexts", "9"], "--contexts: is for decode and planner and step and slots, not for training"),
        (["step", "--bodies", "own"], "--bodies: is for planner, not for step"),
        (["slots"], "slots: needs --model DIR"),
        (["slots", "--model", "x", "--prompts", "y"], "--prompts: is for decode and planner and step, not for slots"),
        (["planner", "--model", "x", "--prompts", "y", "--bodies", "9M"], "--bodies 9M: use own, useless, 11M, 88M"),
        (["planner", "--model", "x", "--prompts", "y", "--bodies", "own@0"], "--bodies own@0: use"),
    ],
)
def test_bad_input(arguments, message, tmp_path):
    done = call("tools/benchmark.py", *arguments, "--output", tmp_path)
    assert done.returncode == 2 and message in done.stderr, done.stderr[-2000:]


def test_the_program(checkpoint, tmp_path):
    (tmp_path / "prompts.jsonl").write_text('"hello"\n"abc"\n')
    command = ["tools/benchmark.py", "step", "--model", checkpoint]
    command += ["--prompts", tmp_path / "prompts.jsonl", "--contexts", 16, "--max-new-tokens", 4, "--repeats", 1]
    command += ["--output", tmp_path, "--json"]
    done = call(*command)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((tmp_path / "step.json").read_text()) == json.loads(done.stdout.splitlines()[-1])


@pytest.mark.process  # matplotlib looks for fonts, once per machine
def test_the_curve_of_slots(checkpoint, tmp_path):
    """The program times each dtype at each number of tokens, beside the products that the engine itself computes."""
    command = ["tools/benchmark.py", "slots", "--model", checkpoint, "--contexts", 16, 4096, "--repeats", 1, "--json"]
    drawn = importlib.util.find_spec("matplotlib") is not None  # an extra: the lowest versions' job lacks it
    plot = ["--plot", tmp_path / "slots.png"] if drawn else []
    done = call(*command, "--output", tmp_path, *plot)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads((tmp_path / "slots.json").read_text())
    assert result == json.loads(done.stdout.splitlines()[-1]) and result["skipped"] == [4096]
    assert not drawn or (tmp_path / "slots.png").stat().st_size > 5000
    curves = {(row["dtype"], row["tokens"]): row for row in result["rows"]}
    assert curves.keys() == {(dtype, tokens) for dtype in ("float32", "bfloat16") for tokens in TOKENS}
    for (_, tokens), row in curves.items():
        assert row["milliseconds"]["median"] > 0 and row["over_products"]["median"] > 0
        assert tokens > 1 or row["over_one_token"]["median"] == 1.0


def test_bare_products_are_those_of_a_forward(checkpoint, monkeypatch):
    """As many, of the same shapes, in the same order; modules that keep their weights too."""
    for keep in (False, True):
        model = load_model(checkpoint, dtype="float32", keep_weights=keep)
        if keep:
            use_lean_forward(model)
        seen = []

        def noted(of, seen):
            return lambda rows: seen.append(tuple(rows.shape)) or of(rows)

        layers = [
            dataclasses.replace(layer, **{n: Product.apart(noted(getattr(layer, n).of, seen)) for n in PRODUCTS})
            for layer in model.lean._layers
        ]
        for name in ("_layers", "_calls"):
            monkeypatch.setattr(model.lean, name, layers)
        for tokens in (1, 6):
            run = model.lean.bare_products(tokens)
            seen.clear()
            run()
            bare = seen[:]
            seen.clear()
            Forwards(model, 1, 32).run([Part(0, 0, [1] * tokens, ForwardLayout(tokens))])
            assert bare == seen and len(bare) == 4 * len(layers)
