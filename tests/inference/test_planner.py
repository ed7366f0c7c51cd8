"""The planner: costs, what it believes of drafts, what it expects of a plan; and the text never depends on it."""

import json
import random
from dataclasses import asdict, replace
from functools import partial

import numpy as np
import pytest
from numpy.testing import assert_allclose  # numpy 1 starts a program as this is imported

from tidar_megatron.inference import costs as timing
from tidar_megatron.inference import engine
from tidar_megatron.inference.acceptance import Acceptance, Copies, Outcomes
from tidar_megatron.inference.candidates import Cost, expect
from tidar_megatron.inference.costs import Clock, Costs, TimedStep, load_costs
from tidar_megatron.inference.drafting import Branches, Drafts, Linear, likeliest_outcomes
from tidar_megatron.inference.engine import generate, generate_batch
from tidar_megatron.inference.forward import ForwardLayout
from tidar_megatron.inference.planner import Planned, Planner, forget_planner, longest_draft, planner_of
from tidar_megatron.inference.request import DecodeOptions
from tidar_megatron.inference.sampling import SamplingOptions

FREE = Costs([1, 272], [64], [[0.01], [0.01]])  # a machine with free slots
DEAR = Costs([1, 272], [64], [[0.001], [0.272]])  # one where every token of a forward costs as much as the first
MIDDLING = Costs([1, 8, 32, 272], [64, 512], [[0.001, 0.002], [0.002, 0.003], [0.004, 0.006], [0.03, 0.05]])


def following(planner):
    policy = Planned(planner.lengths[-1])
    policy.planner = planner
    return policy


def believing(probability, length=16):
    """Acceptance that has seen much of one kind."""
    acceptance = Acceptance()
    for own in (True, False):
        for offset in range(1, length):
            acceptance.counts[own, offset] = [probability * 1e6, 1e6]
    return acceptance


def simulate(draft_length, branches, probability, cost, steps=20_000, seed=0):
    """The same plan played out, with the policies that decode: tokens and seconds a forward."""
    draw = random.Random(seed)
    policy = Linear(draft_length) if branches == 0 else Branches(draft_length, branches)
    drafts, tokens, seconds = Drafts([0]), 0, 0.0
    for _ in range(steps):
        drafts.confidences = [probability] * (len(drafts.tokens) - 1)
        layout = policy.layout(drafts)
        accepted = 1
        while accepted < layout.num_drafts and draw.random() < probability:
            accepted += 1
        tokens += accepted
        seconds += cost(layout.num_tokens)
        drafts = Drafts([0] * (1 + len(layout.rows_after(accepted))))
    return tokens / steps, seconds / steps


@pytest.mark.parametrize("probability", [0.3, 0.7, 0.95])
@pytest.mark.parametrize(("draft_length", "branches"), [(4, None), (8, None), (8, 0), (8, 1), (8, 2), (16, 1), (2, 1)])
def test_what_is_expected_of_a_plan_is_what_it_does(draft_length, branches, probability):
    cost = Cost(Clock(MIDDLING), 100, 1, 272)
    expected = expect(draft_length, branches, believing(probability)).at(cost)
    tokens, seconds = simulate(draft_length, branches, probability, partial(cost, expected.kind))
    assert expected.tokens_per_forward == pytest.approx(tokens, rel=0.03)
    assert expected.seconds == pytest.approx(seconds, rel=0.03)


def choice(costs, probability, batch=1):
    planner = Planner(costs, 16)
    planner.acceptance = believing(probability)
    planner.begin(batch, 100)
    return planner.choice


def test_the_machine_and_the_text_decide():
    assert choice(FREE, 0.9).branches is None and choice(FREE, 0.9).draft_length == 16
    assert choice(DEAR, 0.2).name == choice(MIDDLING, 0.02).name == "ar"
    # 1.5% more tokens a forward are not worth it, for estimates are off by as much
    assert choice(FREE, 0.015).name == "ar" != choice(FREE, 0.05).name
    assert choice(MIDDLING, 0.9).branches in (0, 1, 2) and choice(MIDDLING, 0.9).draft_length > 4
    sizes = [choice(MIDDLING, 0.8, batch).forward_tokens for batch in (1, 4, 32)]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > sizes[-1]  # a batch fills the machine by itself


def test_costs_between_and_beyond_what_was_timed():
    for tokens, context, seconds in (
        (1, 64, 0.001),
        (1, 0, 0.001),
        (2, 64, 0.001 + 0.001 / 7),
        (8, 288, 0.0025),
        (512, 64, 0.03 + 0.026),
        (1, 960, 0.003),
    ):
        for most in (tokens, 600):
            assert MIDDLING.of(np.arange(most + 1), context)[tokens] == pytest.approx(seconds)
        assert MIDDLING.of(tokens, context) == pytest.approx(seconds)
    assert list(Costs([1], [0], [[0.5]]).of(np.arange(10), 9)) == [0.5] * 10
    noisy = Costs([1, 136, 272], [64, 1024], [[0.005, 0.0049], [0.0051, 0.005], [0.00505, 0.0051]])
    assert (noisy.of(np.array([1, 300, 9000]), 65536) >= 0.005).all()


def test_costs_of_batches():
    one = Costs([1, 8], [64, 1064], [[1.0, 2.0], [8.0, 16.0]])
    assert one.of(1, 64, 8) == one.of(8, 64)  # never timed: as many tokens of one sequence
    batches = replace(one, batches=[(8, [1, 8], [3.0, 24.0]), (32, [1, 4], [6.0, 30.0])])
    for tokens, batch, seconds in (
        (1, 8, 3.0),
        (8, 8, 24.0),
        (1, 32, 6.0),
        (4, 32, 30.0),
        (1, 20, 4.5),
        (1, 1, 1.0),
        (1, 2, 1 + 2 / 7),
        (1, 44, 7.5),
    ):
        assert batches.of(tokens, 64, batch) == pytest.approx(seconds)
    assert_allclose(batches.of(8, 64, 32), 62.0)  # beyond what was timed
    assert_allclose(batches.of([1, 8], 1064, 8), [3.0 + 8 * 1.0, 24.0 + 8 * 8.0])  # each reads a context of its own


def test_batches_are_timed_when_they_are_needed(trained, monkeypatch, tmp_path):
    """The cache then holds them beside what was timed before."""
    monkeypatch.setenv("TIDAR_CACHE", str(tmp_path))
    monkeypatch.setattr(timing, "SIZES", (1, 2, 40))
    monkeypatch.setattr(timing, "_still_holds", lambda costs, model: True)
    forget_planner(trained)
    planner = planner_of(trained)
    found = []
    for batch_size in (1, 2, 8, 9, 99):
        assert planner_of(trained, batch_size) is planner
        found.append([(batch, sizes) for batch, sizes, _ in planner.clock.costs.batches])
    assert found == [[], *[[(8, [1, 2])]] * 2, *[[(8, [1, 2]), (32, [1])]] * 2]
    monkeypatch.setattr(timing, "_best_seconds", lambda *_: pytest.fail("timed again"))
    kept = load_costs(trained, 99)
    assert json.dumps(asdict(kept)) == json.dumps(asdict(planner.clock.costs))
    forget_planner(trained)


def test_a_block_says_of_each_offset_what_became_of_it():
    acceptance = Acceptance()
    acceptance.observe(2, False, 3, True)
    assert {key: value[0] for key, value in acceptance.counts.items()} == {
        **{(False, offset): 1 for offset in (2, 3, 4)},
        (False, 5): 0,
    }
    acceptance.observe(1, True, 0, False)
    assert len(acceptance.counts) == 4


def test_acceptance_is_learned_and_forgotten():
    acceptance, draw = Acceptance(), random.Random(0)
    assert acceptance.of(5, True) == pytest.approx(Acceptance.PRIOR)
    for _ in range(500):
        for offset, probability in ((1, 0.9), (2, 0.4)):
            stays = draw.random() < probability
            acceptance.observe(offset, True, int(stays), not stays)
    assert acceptance.of(1, True) == pytest.approx(0.9, abs=0.06)
    assert acceptance.of(2, True) == pytest.approx(0.4, abs=0.1)
    assert acceptance.of(3, True) == pytest.approx(acceptance.of(2, True))  # unseen: as its neighbour
    for _ in range(4000):
        acceptance.observe(1, True, 0, True)
    assert acceptance.of(1, True) < 0.01


@pytest.mark.parametrize("claims", [(0.2, 0.5, 0.9), (0.0, 0.5, 1.0), (1.0,), (0.0,)], ids=str)
def test_lags_are_those_of_the_branches_that_a_plan_would_have_had(claims):
    rng = random.Random(0)
    blocks = [([rng.choice(claims) for _ in range(5)], rng.randint(1, 6)) for _ in range(100)]
    outcomes = Outcomes()
    for confidences, accepted in blocks:
        outcomes.observe(confidences, accepted)
    for count in (2, 4, 6):
        for branches in range(1, count + 1):
            wanted = np.zeros(count + 1)
            for confidences, accepted in blocks:
                there = likeliest_outcomes(confidences[: count - 1], branches)
                stood = min(accepted, count)
                longest = max((r for r in there if r <= stood), default=None)
                wanted[count if longest is None else stood - longest] += 1 / len(blocks)
            assert_allclose(outcomes.lags(count, branches), wanted, atol=1e-12)


def play(planner, probability, steps, draw):
    """So many forwards of one sequence, whose drafts stand with this probability each."""
    policy, drafts = following(planner), Drafts([0])
    for _ in range(steps):
        planner.begin(1, 100)
        layout = policy.layout(drafts)
        accepted = 1
        while accepted < layout.num_drafts and draw.random() < probability:
            accepted += 1
        policy.observe(drafts, layout, accepted)
        planner.end(layout.num_tokens, MIDDLING.of(layout.num_tokens, 100))
        count = len(layout.rows_after(accepted))
        lag = accepted - (layout.branch_after(accepted) or accepted)
        drafts = Drafts([0] * (1 + count), None, [probability] * count, lag)


@pytest.mark.parametrize("seed", range(5))
def test_a_text_that_becomes_another_is_noticed(seed):
    planner, draw = Planner(MIDDLING, 8), random.Random(seed)
    play(planner, 0.9, 3000, draw)
    assert planner._start == 0 and planner.choice.draft_length > 2  # nothing surprising
    play(planner, 0.0, 60, draw)
    assert planner.choice.draft_length < 4
    play(planner, 0.0, 300, draw)
    assert planner.choice.name == "ar"
    play(planner, 0.95, 4 * Planner.PROBE, draw)
    assert planner.choice.draft_length > 2


def follow(planner, gives, takes, steps):
    """On a machine where a step of so many tokens takes other than timed; how often each plan was followed."""
    followed, draw = {}, random.Random(0)
    for _ in range(steps):
        planner.begin(1, 100)
        plan = planner.choice
        followed[plan.key] = followed.get(plan.key, 0) + 1
        planner.observe(Drafts([0]), ForwardLayout(1), int(gives(plan.key) + draw.random()))
        tokens = round(plan.forward_tokens * draw.choice((0.5, 0.8, 1.0, 1.15)))
        planner.end(tokens, takes(tokens) * MIDDLING.of(tokens, 100))
    return followed


def test_a_plan_that_gives_less_than_believed_is_left():
    planner = Planner(MIDDLING, 8)
    planner.acceptance = believing(0.9)
    planner.begin(1, 100)
    first = planner.choice.key
    followed = follow(planner, lambda plan: 1 if plan == first else 5, lambda tokens: 1.0, 2000)
    assert planner.choice.key != first and followed[first] < 400


def test_a_slower_machine_costs_no_plan_and_a_size_that_is_slow_is_left():
    planner = Planner(MIDDLING, 8)
    planner.acceptance = believing(0.9)
    planner.begin(1, 100)
    first = planner.choice
    believed = {plan.key: plan for plan in planner.candidates()}

    def gives(plan):
        return believed[plan].tokens_per_forward

    followed = follow(planner, gives, lambda tokens: 2.0, 1000)
    assert sum(believed[plan].rate * steps for plan, steps in followed.items()) > 0.95 * first.rate * 1000
    now = {plan.key: plan for plan in planner.candidates()}
    for plan in (first.key, (1, None), (8, None)):  # sizes that were never met, too
        assert now[plan].seconds == pytest.approx(2 * believed[plan].seconds, rel=0.1)
    follow(planner, gives, lambda tokens: 6.0 if tokens > 12 else 2.0, 2 * Planner.SELDOM)
    assert planner.choice.forward_tokens < 12


def test_costs_that_were_timed_on_a_busy_machine_are_found_out():
    """Drafting was believed to cost a hundred times what it does, so nothing would ever draft but for the probes."""
    poisoned = Costs([1, 8, 32, 272], [64, 512], [[0.001, 0.001], *[[0.2, 0.2]] * 3])
    planner = Planner(poisoned, 8)
    planner.acceptance = believing(0.9)
    planner.begin(1, 100)
    assert planner.choice.name == "ar"
    policy = following(planner)
    for _ in range(4000):
        planner.begin(1, 100)
        layout = policy.layout(Drafts([0]))
        planner.end(layout.num_tokens, 0.001 + 0.0001 * layout.num_tokens)
    assert planner.choice.draft_length > 2


def test_drafts_are_tried_again_after_plain_steps():
    planner = Planner(DEAR, 8)
    planner.acceptance = believing(0.0, 8)
    planner.begin(1, 100)
    policy = following(planner)
    plans = [policy.layout(Drafts([0])) for _ in range(Planner.PROBE + 10)]
    assert plans.count(ForwardLayout(1, (1,), 8)) == 1 and plans.count(ForwardLayout(1)) == len(plans) - 1
    plans += [following(planner).layout(Drafts([0])) for _ in range(Planner.PROBE)]  # short texts, one after the other
    assert plans.count(ForwardLayout(1, (1,), 8)) == 2
    assert policy.layout(Drafts([0, 1, 2])) == ForwardLayout(3)


@pytest.mark.parametrize(("failed", "every"), [(4, Planner.CHECK), (40, Planner.PROBE)])
def test_drafts_are_tried_again_soon_where_few_have_failed(failed, every):
    """A warm-up on no text, say, and then a text where nearly all would stand."""
    planner = Planner(DEAR, 8)
    for _ in range(failed):
        planner.acceptance.observe(1, True, 0, True)
    planner.begin(1, 100)
    assert planner.choice.name == "ar"
    policy = following(planner)
    plans = [policy.layout(Drafts([0])) for _ in range(Planner.PROBE)]
    assert plans.count(ForwardLayout(1, (1,), 8)) == Planner.PROBE // every


def test_costs_are_timed_once_and_kept(trained, tmp_path, monkeypatch):
    monkeypatch.setenv("TIDAR_CACHE", str(tmp_path))
    first = load_costs(trained)
    assert first.sizes[0] == 1 and all(seconds > 0 for row in first.seconds for seconds in row)
    assert first.sizes[-1] + first.contexts[-1] <= trained.context_limit
    monkeypatch.setattr(timing, "measure_costs", lambda model: 1 / 0)
    slow = Costs(first.sizes, first.contexts, [[1000 * seconds for seconds in row] for row in first.seconds])
    assert not timing._still_holds(slow, trained)
    monkeypatch.setattr(timing, "_still_holds", lambda costs, model: True)  # other tests keep the machine busy
    assert load_costs(trained) == first
    (path,) = tmp_path.iterdir()
    path.write_text("{")
    with pytest.raises(ZeroDivisionError):
        load_costs(trained)


@pytest.mark.slow
@pytest.mark.parametrize("costs", [FREE, DEAR, MIDDLING])
def test_the_text_does_not_depend_on_the_plan(trained, prompts, costs, monkeypatch):
    """Also while the plan changes: alone, in a batch, and on a planner that has learned from other text."""
    planner = Planner(costs, longest_draft(trained))
    monkeypatch.setattr(engine, "planner_of", lambda model, batch_size: planner)
    expected = [generate(trained, prompt, DecodeOptions("ar", max_new_tokens=50)).token_ids for prompt in prompts]
    for _ in range(2):
        assert [generate(trained, p, DecodeOptions(max_new_tokens=50)).token_ids for p in prompts] == expected
        batch = generate_batch(trained, prompts, DecodeOptions(max_new_tokens=50), 3)
        assert [generation.token_ids for generation in batch] == expected
    explained = planner.explain()
    assert "tokens/forward" in explained and "accepted by offset" in explained


def test_copies_are_taken_where_they_are_accepted_more():
    """Each length of match counts apart; copies say nothing about the model's own drafts, and are tried again."""
    planner = Planner(FREE, 8)
    planner.acceptance = believing(0.6)
    planner.begin(1, 100)
    assert planner.choice.draft_length > 1
    policy = Planned(8, [1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2])
    policy.planner = planner
    found = policy.look_up([3])  # 1 2 3 was there before
    assert (found.tokens[:3], found.match) == ([4, 5, 6], 3) and len(found.confidences) == len(found.tokens)
    before = dict(planner.acceptance.counts)
    for _ in range(40):
        policy.observe(Drafts([3, *found.tokens], copied=3), ForwardLayout(8), 1)
    assert planner._seen == [] and planner.acceptance.counts == before
    assert policy.look_up([4]).match == 4  # longer matches are others
    assert policy.look_up([0, 1, 2, 3]).tokens == []
    waited = next(n for n in range(2000) if planner.copied(3))
    assert waited > 50
    assert Planned(8, [1, 1])._copier.copy(3).match == 1 and not planner.copied(1)


def text_of(planner, match, accepted, steps, own=1):
    """Take steps with a match of this length, of whose copies ``accepted`` tokens stand; return what was copied."""
    taken = []
    for _ in range(steps):
        planner.begin(1, 100)
        count = planner.copied(match)
        taken.append(count)
        drafts = Drafts([0] * (1 + count), copied=match if count else 0)
        planner.observe(drafts, ForwardLayout(1 + count), min(accepted, 1 + count))
        planner.end(1 + count, planner.clock.costs.of(1 + count, 100, 1))
    return taken


@pytest.mark.parametrize("costs", [MIDDLING, DEAR])
def test_plain_steps_copy_where_it_pays(costs):
    """Copies must give more tokens than their verification takes time, whatever the model's own drafts are worth."""
    planner = Planner(costs, 8)
    planner.acceptance = believing(0.01)
    planner.begin(1, 100)
    assert planner.choice.name == "ar"
    useless = text_of(planner, 4, 1, 300)
    assert sum(map(bool, useless[100:])) < 20  # tried now and then
    useful = text_of(planner, 3, 8, 300)
    price = costs.of(8, 100, 1) / costs.of(1, 100, 1)
    assert (useful[-1] == 7) == (price < 8) and planner.choice.name == "ar"


def test_copies_are_compared_with_drafts_after_as_long_a_match():
    copies = Copies()
    for _ in range(60):
        copies.observe(3, 4, 8)  # three of seven copies stand
        copies.drafted(3, 6)  # where text matches, own drafts are better
        copies.drafted(0, 2)
    assert copies.tokens(3, 8) == pytest.approx(3.6, abs=0.01)  # as if each had the same chance, 3 of 4
    assert not copies.beside_drafts(3, 8, alternates=False)
    assert copies.beside_drafts(3, 8, alternates=True)  # (1 + 6) / 2 tokens per forward
    assert copies.gain(3.0, 8) == 0 and copies.chance(1) == pytest.approx(Copies.PRIOR[1])


def test_plans_that_draft_must_beat_plain_steps_with_copies():
    planner = Planner(MIDDLING, 8)
    planner.acceptance = believing(0.6)
    planner.begin(1, 100)
    assert planner.choice.draft_length > 1
    plain = next(plan for plan in planner.candidates() if plan.draft_length == 1)
    assert plain.tokens_per_forward == 1 and plain.forward_tokens == 1  # nothing has matched
    text_of(planner, 4, 8, 200)
    found = {plan.draft_length: plan for plan in planner.candidates()}
    assert found[1].tokens_per_forward > 4 and found[1].forward_tokens > 4
    assert found[8].tokens_per_forward > 4  # they copy too


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_copying_changes_no_token(trained, temperature):
    """Text that repeats itself, with a planner that copies whenever it can."""
    planner = planner_of(trained)
    planner.copies._drafted = [0.0] * 5
    prompt = [1, 2, 3, 4, 5, 6, 7] * 3
    sampling = SamplingOptions(temperature=temperature, seed=3)
    taken = []
    watched = planner.copies.observe
    planner.copies.observe = lambda match, accepted, num_drafts: taken.append(match)
    greedy = generate(trained, prompt, DecodeOptions("ar", max_new_tokens=40, sampling=sampling)).token_ids
    found = generate(trained, prompt, DecodeOptions(max_new_tokens=40, sampling=sampling)).token_ids
    planner.copies.observe = watched
    forget_planner(trained)
    assert any(taken) and (temperature or found == greedy)


def test_without_a_tidar_section_it_is_autoregression(tiny):
    model = tiny("llama", tidar=False)
    plain = generate(model, [1, 2], DecodeOptions("ar", max_new_tokens=20))
    assert generate(model, [1, 2], DecodeOptions(max_new_tokens=20)).token_ids == plain.token_ids


def test_steps_that_read_prompts_are_counted_but_not_timed():
    planner = Planner(MIDDLING, 8)
    for _ in range(50):
        planner.begin(2, 100)
        planner.observe(Drafts([0, 0]), ForwardLayout(2), 1)
        planner.end(20, None)
    assert planner.choice.name == "ar" and planner.clock.curve(0, 2, 100, 1)[1] == MIDDLING.of(1, 100, 2)


def test_sizes_that_were_not_seen_of_late_are_not_believed():
    clock = Clock(MIDDLING)
    for _ in range(40):
        clock.observe(TimedStep(0, 1, 64, 8, 0.2))
    for _ in range(Clock.OLD):
        clock.observe(TimedStep(0, 1, 64, 1, 0.001))
    assert clock.curve(0, 1, 64, 8)[8] == pytest.approx(0.002, rel=0.01)
    clock.observe(TimedStep(0, 1, 64, 8, 0.003))
    assert clock.curve(0, 1, 64, 8)[8] == pytest.approx(0.003, rel=0.1)


def test_plain_steps_of_a_batch_are_tried_where_only_larger_ones_are_known():
    """Those may be far slower than their size tells."""
    planner, draw = Planner(Costs([1, 272], [64], [[0.001], [0.0015]]), 8), random.Random(0)
    planner.acceptance = believing(0.3)
    for _ in range(200):
        planner.begin(3, 100)
        planner.observe(Drafts([0, 0]), ForwardLayout(2), 1 + (draw.random() < 0.3))
        tokens = round(3 * planner.choice.forward_tokens)
        planner.end(tokens, 0.001 if tokens == 3 else 0.004)
    assert planner.choice.name == "ar"
