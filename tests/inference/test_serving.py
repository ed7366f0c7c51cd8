"""Many requests at once: each gets what it gets alone, none disturbs another, and nothing piles up."""

import gc
import random

import psutil
import pytest
import torch

from tests.conftest import THOROUGH
from tests.inference.options import ar, tidar
from tidar_megatron.errors import UserError
from tidar_megatron.inference import engine
from tidar_megatron.inference.engine import Engine, generate, generate_batch
from tidar_megatron.inference.request import DecodeOptions
from tidar_megatron.inference.sampling import SamplingOptions
from tidar_megatron.inference.sequence import Sequence

REQUESTS = 1000 if THOROUGH else 400


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["tidar", "linear", "ar", "lookup"])
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_a_batch_gives_each_prompt_what_it_gives_alone(trained, prompts, mode, batch_size, monkeypatch):
    """Ragged, longer than a chunk of the prompt, more than there are slots; the same drafts are accepted, too."""
    monkeypatch.setattr(engine, "PROMPT_CHUNK", 12)
    options = DecodeOptions(mode, None if mode == "ar" else 8, 2 if mode == "tidar" else "all", 40)
    together = generate_batch(trained, prompts, options, batch_size)
    for prompt, ours in zip(prompts, together, strict=True):
        alone = generate(trained, prompt, options)
        assert (ours.token_ids, ours.emitted, ours.stop) == (alone.token_ids, alone.emitted, alone.stop)


def test_requests_of_all_kinds_share_a_forward(trained, prompts):
    kinds = [tidar(8), tidar(4, 1), DecodeOptions("linear", 6), ar(), DecodeOptions("lookup", 5), tidar(8, "all", 5)]
    serving = Engine(trained, 4, 250)
    sequences = [serving.submit(prompt, options) for prompt, options in zip(prompts[1:], kinds, strict=False)]
    while not serving.is_idle:
        serving.step()
    for prompt, options, sequence in zip(prompts[1:], kinds, sequences, strict=False):
        assert sequence.tokens == generate(trained, prompt, options).token_ids


def test_one_that_is_cancelled_or_fails_disturbs_nobody(trained, prompts, monkeypatch):
    expected = [generate(trained, prompt, tidar(8, 2, 30)).token_ids for prompt in prompts[3:7]]
    serving = Engine(trained, 3, 250)
    running = [serving.submit(prompt, tidar(8, 2, 30)) for prompt in prompts[3:7]]
    broken, cancelled = running[1], running[2]
    monkeypatch.setattr(broken, "draft", lambda *rows: 1 / 0)
    serving.step()
    assert broken.stop == "error" and isinstance(broken.error, ZeroDivisionError)
    serving.step()
    serving.cancel(cancelled)
    waiting = serving.submit(prompts[3], ar())
    serving.cancel(waiting)
    while not serving.is_idle:
        serving.step()
    assert (cancelled.stop, waiting.stop, waiting.tokens) == ("cancelled", "cancelled", [])
    assert cancelled.tokens == expected[2][: len(cancelled.tokens)] != []
    assert [running[0].tokens, running[3].tokens] == [expected[0], expected[3]]


def test_the_queue_and_the_slots_have_bounds(trained, prompts):
    with pytest.raises(UserError, match="batch size 0: must be at least 1"):
        generate_batch(trained, prompts, ar(), 0)
    assert generate_batch(trained, [], ar()) == []
    serving = Engine(trained, 1, 60, queue_size=2)
    with pytest.raises(UserError, match=r"needs room for \d+ tokens and the engine's slots have 60"):
        serving.submit(prompts[4], tidar(8))
    for _ in range(3):  # one of which has a slot, as soon as there is a step
        serving.submit(prompts[0], ar())
    with pytest.raises(UserError, match="3 requests are waiting already"):
        serving.submit(prompts[0], ar())
    serving.step()
    with pytest.raises(UserError, match="2 requests are waiting already"):
        serving.submit(prompts[0], ar())


@pytest.mark.slow
def test_nothing_piles_up_over_hundreds_of_requests(trained):
    """Cancelled and failing ones among them; memory after the first hundred stays what it is."""
    draw = random.Random(0)
    serving = Engine(trained, 8, 200, queue_size=64)
    process, sizes, ended = psutil.Process(), [], []
    kinds = [tidar(8, 2, 12), DecodeOptions("linear", 6, max_new_tokens=9), ar(5), tidar(4, "all", 7)]
    kinds.append(tidar(8, 1, 10, sampling=SamplingOptions(1.0, top_p=0.9, repetition_penalty=1.2)))
    live: list[Sequence] = []
    for number in range(REQUESTS):
        prompt = [draw.randrange(47) for _ in range(draw.randrange(1, 40))]
        live.append(serving.submit(prompt, draw.choice(kinds)))
        if number % 7 == 0:
            serving.cancel(draw.choice(live))
        if number % 11 == 0:
            draw.choice(live).draft = lambda *rows: 1 / 0
        serving.step()
        while len(live) > 32:
            serving.step()
            ended += [sequence.stop for sequence in live if sequence.stop]
            live = [sequence for sequence in live if not sequence.stop]
        if number % 100 == 99:
            gc.collect()
            sizes.append((process.memory_info().rss, serving._forwards.pool.num_bytes))
    while not serving.is_idle:
        serving.step()
    ended += [sequence.stop for sequence in live]
    assert len(ended) == REQUESTS and {"length", "cancelled", "error"} <= set(ended)
    assert ended.count("length") > 0.7 * REQUESTS
    live.clear()
    gc.collect()
    assert not any(isinstance(found, Sequence) for found in gc.get_objects())
    assert len({pool for _, pool in sizes}) == 1
    assert sizes[-1][0] - sizes[0][0] < 20e6, sizes
    assert sorted(serving._free) == list(range(8))


@pytest.mark.parametrize("sampling", [SamplingOptions(), SamplingOptions(temperature=1.0, seed=1)])
def test_what_is_no_number_ends_one_request_and_leaves_nothing_behind(trained, prompts, sampling):
    """Its K/V may be none either: a shorter one that takes the slot beside a longer one must not see it."""
    expected = [generate(trained, prompt, DecodeOptions("ar", max_new_tokens=20)).token_ids for prompt in prompts]
    engine = Engine(trained, 2, 120, queue_size=4)
    bad = engine.submit(prompts[-1], DecodeOptions("tidar", 4, max_new_tokens=30, sampling=sampling))
    long = engine.submit(prompts[-1], DecodeOptions("ar", max_new_tokens=20))
    engine.step()
    with torch.inference_mode():
        for pair in engine._forwards.pool._layers.values():
            for room in pair:
                room[bad.slot].fill_(float("nan"))
    later = engine.submit(prompts[2], DecodeOptions("ar", max_new_tokens=20))
    while not engine.is_idle:
        engine.step()
    assert bad.stop == "error" and "NaN or infinite" in str(bad.error)
    assert long.tokens == expected[-1] and later.tokens == expected[2]


def test_what_is_no_number_leaves_nothing_behind_where_it_is_cancelled_unread(trained, prompts):
    """Within its prompt, before a logit could have told."""
    expected = [generate(trained, prompt, ar(20)).token_ids for prompt in (prompts[2], prompts[-1])]
    engine = Engine(trained, 2, 120)
    bad, other = engine.submit(prompts[-1], ar(20)), engine.submit(prompts[-1], ar(20))
    engine.step()
    with torch.inference_mode():
        for pair in engine._forwards.pool._layers.values():
            for room in pair:
                room[bad.slot].fill_(float("nan"))
    engine.cancel(bad)
    later = engine.submit(prompts[2], ar(20))
    while not engine.is_idle:
        engine.step()
    assert [later.tokens, other.tokens] == expected


@pytest.mark.parametrize("temperature", [1e-39, 1e-5])
def test_no_temperature_that_logits_cannot_be_divided_by(trained, temperature):
    options = DecodeOptions("ar", sampling=SamplingOptions(temperature=temperature))
    with pytest.raises(UserError, match=r"use 0 \(greedy\), or at least"):
        generate(trained, [1], options)
