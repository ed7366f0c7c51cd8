"""Forwards of few shapes: as those without padding; few shapes, and nothing compiled per step."""

from dataclasses import replace

import pytest
import torch

from tests.conftest import THOROUGH
from tests.inference.test_planner import MIDDLING
from tests.ranks import run
from tidar_megatron.inference.cache import KVPool
from tidar_megatron.inference.engine import Engine
from tidar_megatron.inference.forward import ForwardLayout, PackedForward, Part
from tidar_megatron.inference.logits import Best
from tidar_megatron.inference.planner import Planner, longest_draft
from tidar_megatron.inference.request import DecodeOptions, parse_plan
from tidar_megatron.inference.sampling import SamplingOptions
from tidar_megatron.inference.static import KEPT, MARGIN, TOKENS, Forwards, Shape, rounded_prefix
from tidar_megatron.inference.wrapping import wrap_model

PLANS = ["ar", "lookup:6", "linear:8", "all:4", "1:8", "2:8", "auto"]


def decode(model, prompts, plan, static, slots=3, tokens=60):
    options = parse_plan(plan)
    engine = Engine(model, slots, 700, queue_size=len(prompts), static=static)
    asked = [
        engine.submit(prompt, DecodeOptions(**{**vars(options), "max_new_tokens": tokens - 7 * (number % 3)}))
        for number, prompt in enumerate(prompts)
    ]
    while not engine.is_idle:
        engine.step()
    assert all(sequence.error is None for sequence in asked)
    return [sequence.tokens for sequence in asked], engine


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS)
def test_tokens_are_those_of_packed_forwards(trained, prompts, plan):
    expected, packed = decode(trained, prompts, plan, False)
    found, engine = decode(trained, prompts, plan, True)
    assert found == expected
    assert engine._forwards.shapes and not packed._forwards.shapes


@pytest.mark.parametrize("groups", [1, 2])
def test_hidden_states_are_those_of_packed_forwards(tiny, groups):
    """Behind prefixes of several lengths, one of them empty, other plans side by side, a slot without a sequence."""
    model = tiny("llama" if groups == 2 else "qwen2")
    layouts = {0: ForwardLayout(3, (1, 3), 4), 1: ForwardLayout(1), 3: ForwardLayout(5, (2,), 3)}
    lengths = {0: 9, 1: 0, 3: 30}
    hidden = {}
    with torch.inference_mode():
        for static in (False, True):
            forwards = Forwards(model, 4, 100, static)
            for slot, length in lengths.items():
                if length:
                    forwards.run([Part(slot, 0, [7 + slot] * length, ForwardLayout(length))], reads_prompt=True)
            parts = [Part(slot, lengths[slot], [5] * layout.num_drafts, layout) for slot, layout in layouts.items()]
            for _ in range(2):  # the second writes over what the first has left
                out, forward = forwards.run(parts)
            rows = [
                out[start : start + part.layout.num_tokens] for start, part in zip(forward.starts, parts, strict=True)
            ]
            hidden[static] = torch.cat(rows)
            assert isinstance(forward, PackedForward) != static
    torch.testing.assert_close(hidden[True], hidden[False], rtol=0, atol=1e-5)


@pytest.mark.slow
def test_shapes_are_few(trained, prompts, monkeypatch):
    """Sizes are rounded up to a few, whatever the plans, lengths and numbers of sequences.

    The planner's choices do not depend on how fast this machine is now.
    """
    planner = Planner(MIDDLING, longest_draft(trained))
    end = planner.end
    monkeypatch.setattr(planner, "end", lambda size, seconds, beside: end(size, None))
    monkeypatch.setattr("tidar_megatron.inference.engine.planner_of", lambda model, batch_size: planner)
    steps = 0
    for plan in PLANS:
        trained.idle_forwards.clear()
        _, engine = decode(trained, prompts, plan, True, 3)
        shapes = engine._forwards.shapes
        for shape in shapes:
            own = -(-shape.tokens // 64) * 64
            assert shape.tokens in TOKENS and shape.keys - own in (320, 448, 576, 832)
        assert len({shape.tokens for shape in shapes}) <= 6
        steps += sum(forward._uses for forward in shapes.values())
    assert steps > 200


def test_engines_share_what_is_captured(tiny):
    """One after the other they have the same runner; side by side, or with slots of another size, they do not."""
    model, prompt = tiny("llama"), [1, 2, 3]
    model.idle_forwards.clear()

    def engine(slots=2, capacity=500):
        made = Engine(model, slots, capacity, static=True)
        sequence = made.submit(prompt, DecodeOptions("tidar", 4, max_new_tokens=12, ignore_eos=True))
        while not made.is_idle:
            made.step()
        return made, sequence.tokens

    first, tokens = engine()
    beside, same = engine()
    assert beside._forwards is not first._forwards and same == tokens
    runner, shapes = first._forwards, dict(first._forwards.shapes)
    assert shapes and not model.idle_forwards
    with torch.inference_mode():
        for keys, values in runner.pool._layers.values():  # as a request that failed may leave them
            keys.fill_(float("nan"))
            values.fill_(float("nan"))
    del first
    again, same = engine(capacity=510)  # is rounded to the same size
    assert again._forwards is runner and same == tokens
    assert runner.shapes == shapes  # nothing is captured again
    del again, beside
    assert len(model.idle_forwards) == 1
    for capacity in (1000, 2000, 4000):
        engine(capacity=capacity)
    assert len(model.idle_forwards) == KEPT
    assert not any(kept is runner for kept in model.idle_forwards.values())


def test_without_static_shapes_nothing_is_kept(tiny):
    model = tiny("llama")
    model.idle_forwards.clear()
    Engine(model, 2, 500, static=False)
    assert not model.idle_forwards


@pytest.mark.parametrize("draft_length", [2, 4, 8, 16])
def test_usual_plans_are_not_padded(draft_length):
    branched = [
        ForwardLayout(draft_length, tuple(range(draft_length))[-branches:], draft_length)
        for branches in (1, 2, draft_length)
    ]
    for layout in (ForwardLayout(1), ForwardLayout(draft_length), *branched):
        assert layout.num_tokens in TOKENS


def test_rounding_adds_little_and_prefixes_are_aligned():
    for size in range(1, TOKENS[-1] + 1):
        assert next(rounded for rounded in TOKENS if rounded >= size) - size <= MARGIN
    sizes = {rounded_prefix(length) for length in range(20_000)}
    assert len(sizes) == 14 and all(size % 64 == 0 for size in sizes)
    assert all(length <= rounded_prefix(length) <= max(320, 1.5 * length) for length in range(20_000))
    assert [rounded_prefix(context + 1) for context in (256, 1024, 4096)] == [320, 1088, 4160]


@pytest.mark.parametrize("plan", ["ar", "lookup:4", "linear:4", "all:8", "2:8"])
def test_a_step_reads_the_output_layer_once_and_waits_once(tiny, plan, monkeypatch):
    """Each copy to the host waits for the device. all:8 has 72 tokens in a forward."""
    model, heads, copies = tiny("llama"), [], []
    logits, to_list = type(model).logits, torch.Tensor.tolist
    monkeypatch.setattr(type(model), "logits", lambda *rows: heads.append(rows) or logits(*rows))

    def floats(tensor):  # the whole numbers are those of layouts, on the host
        if tensor.is_floating_point() and not any(tensor is seen for seen in copies):  # megatron's mode calls it twice
            copies.append(tensor)
        return to_list(tensor)

    monkeypatch.setattr(torch.Tensor, "tolist", floats)
    engine = Engine(model, 2, 200, static=True)
    options = DecodeOptions(**{**vars(parse_plan(plan)), "max_new_tokens": 30, "ignore_eos": True})
    asked = [engine.submit(prompt, options) for prompt in ([1, 2, 3], [4, 5])]
    steps = 0
    while not engine.is_idle:
        reads_prompt = any(sequence.reads_prompt for sequence in asked)
        heads.clear()
        copies.clear()
        engine.step()
        if not reads_prompt and steps:
            assert (len(heads), len(copies)) == (1, 1)
        steps += 1
    assert steps > 3 and all(len(sequence.tokens) == 30 for sequence in asked)


@pytest.mark.parametrize(("plans", "temperature", "computed"), [
    (["ar", "lookup:4", "linear:4", "all:8"], 0.0, False),
    (["ar", "2:8"], 0.0, True),
    (["2:8"], 1.0, False),  # a drawn draft has its own distribution
])  # fmt: skip
def test_probabilities_are_computed_only_where_a_plan_uses_them(tiny, plans, temperature, computed, monkeypatch):
    """They read the logits of all rows once more."""
    model, reads, logsumexp = tiny("llama"), [], torch.Tensor.logsumexp

    def counted(rows, dim):
        if rows.shape[-1] == model.vocab_size:
            reads.append(rows)
        return logsumexp(rows, dim)

    monkeypatch.setattr(torch.Tensor, "logsumexp", counted)
    engine = Engine(model, len(plans), 200, static=True)
    more = {"max_new_tokens": 20, "ignore_eos": True, "sampling": SamplingOptions(temperature, seed=0)}
    asked = [engine.submit([1, 2, 3], replace(parse_plan(plan), **more)) for plan in plans]
    while not engine.is_idle:
        engine.step()
    assert all(len(sequence.tokens) == 20 for sequence in asked)
    assert bool(reads) == computed


@pytest.mark.parametrize("batch", [1, 3])
def test_on_a_cpu_probabilities_are_those_of_drafts_alone(tiny, batch, monkeypatch):
    """The rows that verify have none, which would read their logits once more."""
    model, made, of = tiny("llama"), [], Best.of
    monkeypatch.setattr(
        Best, "of", lambda logits, probabilities: made.append((len(logits), probabilities)) or of(logits, probabilities)
    )
    engine = Engine(model, batch, 200)
    options = replace(parse_plan("2:8"), max_new_tokens=20, ignore_eos=True)
    asked = [engine.submit([1, 2, 3], options) for _ in range(batch)]
    expected = 0
    while not engine.is_idle:
        engine.step()
        expected += sum(len(sequence.draft_rows) for sequence in asked)
    assert made and sum(rows for rows, probabilities in made if probabilities) <= expected


def test_shape_of_parts():
    pool = KVPool(6, 3000)
    parts = [Part(0, 300, [1], ForwardLayout(1)), Part(4, 20, [1] * 3, ForwardLayout(3, (1, 3), 5))]
    assert Shape.of(parts[:1], pool) == (1, 1, 384)
    assert Shape.of(parts, pool) == (6, 16, 384)
    assert Shape.of([Part(1, 2900, [1] * 8, ForwardLayout(8))], pool) == (2, 8, 3072)
    assert Shape.of([Part(0, 0, [1] * 600, ForwardLayout(600))], pool) is None


COMPILED = """
import torch
from tests.inference.conftest import make_causal_lm
from tests.inference.test_static import decode
from tidar_megatron.inference.engine import Engine
from tidar_megatron.inference.wrapping import wrap_model
from tidar_megatron.inference.planner import Planner, longest_draft
from tidar_megatron.inference.request import DecodeOptions, parse_plan
from tidar_megatron.inference.static import StaticForward

model, made = wrap_model(make_causal_lm("qwen3", torch.float32)), []


def backend(module, inputs):
    made.append(len(inputs))
    return module


plain = model.forward
compiled = torch.compile(plain, backend=backend, dynamic=False)
plans = ("ar", "1:8", "all:4")
expected = [decode(model, [[1, 2, 3]], plan, True, 1, 40)[0] for plan in plans]
vars(model)["forward"] = lambda packed: (compiled if isinstance(packed, StaticForward) else plain)(packed)
engine = Engine(model, 1, 700, static=True)
counts = []
with torch._dynamo.config.patch(recompile_limit=64):
    for _ in range(3):
        for number, plan in enumerate(plans):
            options = DecodeOptions(**{**vars(parse_plan(plan)), "max_new_tokens": 40})
            sequence = engine.submit([1, 2, 3], options)
            while not engine.is_idle:
                engine.step()
            assert [sequence.tokens] == expected[number]
        counts.append(len(made))
print("graphs:", *counts, "shapes:", len(engine._forwards.shapes))
"""


@pytest.mark.skipif(not THOROUGH, reason="takes 6 s, to start torch's compiler: .ci/run runs it")
@pytest.mark.process
def test_nothing_is_compiled_per_step():
    """torch.compile sees every shape once: as many graphs as it made for a first text serve all later ones.

    In a process of its own, for what others have done may make torch.compile break graphs.
    """
    done = run("-c", COMPILED)
    assert done.returncode == 0, done.stderr[-3000:]
    _, *counts, _, shapes = done.stdout.split()
    assert len(set(counts)) == 1
    assert 1 < int(counts[0]) <= int(shapes) + 1  # the first one finds the pool without its tensors


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("plan", PLANS)
def test_captured_graphs_say_the_same(trained, prompts, plan):
    model = wrap_model(trained.causal_lm.cuda(), trained.tokenizer)
    try:
        expected, _ = decode(model, prompts, plan, False)
        found, engine = decode(model, prompts, plan, True)
        assert found == expected
        assert any(forward._graph is not None for forward in engine._forwards.shapes.values())
    finally:
        trained.causal_lm.cpu()


def test_a_step_without_room_for_rounding_up_is_a_packed_one():
    """A text near its end, whose slot cannot hold as many tokens as its neighbour brings."""
    pool = KVPool(2, 128)
    parts = [Part(0, 123, [1], ForwardLayout(1)), Part(1, 10, [1] * 8, ForwardLayout(8, (1,), 8))]
    assert Shape.of(parts, pool) is None and Shape.of(parts[1:], pool) is not None
