"""The planner: costs, what it learns of drafts, what it chooses; and the text never depends on it."""

import itertools
import random

import numpy as np
import pytest
import torch

from tidar_megatron.inference import choosing, engine
from tidar_megatron.inference.acceptance import AGREE, DIFFER, Acceptance, Shares, agreement
from tidar_megatron.inference.choosing import Contents, Prices, choose
from tidar_megatron.inference.costs import Costs
from tidar_megatron.inference.draft_weights import Drafted
from tidar_megatron.inference.drafting import NOTHING, Branches, Copied, Copier, Drafts, Linear, Policy
from tidar_megatron.inference.engine import generate, generate_batch
from tidar_megatron.inference.forward import ForwardLayout, Part
from tidar_megatron.inference.planned import Planned
from tidar_megatron.inference.planner import Planner, longest_draft
from tidar_megatron.inference.request import DecodeOptions
from tidar_megatron.inference.sampling import Sampler, SamplingOptions
from tidar_megatron.inference.sequence import Sequence

FREE = Costs([1, 272], [64], [[0.01], [0.01]])  # a machine with free slots
DEAR = Costs([1, 272], [64], [[0.001], [0.272]])  # one where every token of a forward costs as much as the first
MIDDLING = Costs([1, 8, 32, 272], [64, 512], [[0.001, 0.002], [0.002, 0.003], [0.004, 0.006], [0.03, 0.05]])


def following(planner, prompt=()):
    policy = Planned(planner.lengths[-1], prompt)
    policy.planner = planner
    return policy


def prices(costs, rate, fresh=0.0, late=0.0, lengths=(4, 8)):
    seconds = [rate * second for second in costs.of(np.arange(300), 100)]
    most = lengths[-1]
    return Prices(seconds, seconds, lengths, [fresh * n for n in range(most)], [late * n for n in range(most)])


def value(contents, chances, prices):
    """Return the value of a forward, outcome by outcome."""
    whole = 0.0
    for accepted in range(1, contents.num_drafts + 1):
        chance = np.prod(chances[: accepted - 1])
        if accepted < contents.num_drafts:
            chance *= 1 - chances[accepted - 1]
        whole += chance * accepted
        fitting = [branch for branch in contents.branches if branch <= accepted]
        if fitting:
            lag = accepted - max(fitting)
            left = contents.draft_length - 1 - lag
            whole += chance * (0 if left <= 0 else prices.late[left] if lag else prices.fresh[left])
    if contents.branches:
        return whole - prices.drafting[contents.num_tokens] - choosing.WORTH
    return whole - prices.plain[contents.num_drafts]


@pytest.mark.parametrize("seed", range(20))
def test_the_choice_is_the_one_of_the_highest_value(seed):
    """Drafts are counted without masks; of the sets of branches, none is better."""
    draw = random.Random(seed)
    own, copied = ([draw.random() ** draw.choice((0.2, 1, 3)) for _ in range(draw.randrange(8))] for _ in range(2))
    market = prices(draw.choice((FREE, DEAR, MIDDLING)), draw.choice((100, 300, 1000)), draw.random(), draw.random())
    found = choose(own, copied, market)
    best = []
    for copies, chances in ((False, []), (False, own), (True, copied)):
        counts = range(1, len(chances) + 2)
        count = max(counts, key=lambda n: value(Contents(copies, n, (), 0), chances, market))
        ranked = sorted(range(count, 0, -1), key=lambda n: -outcome_chance(chances[: count - 1], n))
        sets = [tuple(sorted(ranked[:most])) for most in (0, 1, 2, 3, count)]
        best += [
            value(Contents(copies, count, branches, length), chances, market) for branches in sets for length in (4, 8)
        ]
    assert value(found, copied if found.copies else own, market) == pytest.approx(max(best))
    without = value(choose([], copied, market), copied, market)
    assert len(found.gains) == len(own)
    if own:
        assert found.gains[-1] == pytest.approx(max(0.0, max(best) - without))
        assert list(found.gains) == sorted(found.gains)
        for count in range(1, len(own)):
            assert found.gains[count - 1] <= found.gains[-1]


def outcome_chance(chances, accepted):
    reached = float(np.prod(chances[: accepted - 1]))
    return reached * (1 - chances[accepted - 1]) if accepted <= len(chances) else reached


def come(draw, probability, num_drafts):
    """Return the tokens of a forward: 0 is what each draft says, and it is right with this probability."""
    tokens = []
    while len(tokens) < num_drafts:
        tokens.append(int(draw.random() >= probability))
        if tokens[-1]:
            break
    return tokens


def play(planner, probability, steps, draw, costs=MIDDLING, batch=1, deciding=0.0):
    """Take steps of sequences whose drafts are right with this probability; return tokens per second of each.

    A decision takes ``deciding`` seconds, on any machine.
    """
    planner.spend = lambda seconds: setattr(planner, "deciding", deciding)
    policies, drafts = [following(planner) for _ in range(batch)], [Drafts([0]) for _ in range(batch)]
    for policy in policies:
        policy._copier.copy = lambda count: NOTHING
    tokens = seconds = 0.0
    for _ in range(steps):
        planner.begin(batch, 100)
        total = 0
        for n, policy in enumerate(policies):
            _, layout = policy.plan(drafts[n], 1000)
            final = come(draw, probability, layout.num_drafts)
            policy.observe(final, layout.num_drafts)
            accepted = len(final)
            count = len(layout.rows_after(accepted))
            lag = accepted - (layout.branch_after(accepted) or accepted)
            drafts[n] = Drafts([0] * (1 + count), None, [probability] * count, lag)
            total += layout.num_tokens
            tokens += accepted
        took = float(costs.of(total / batch, 100, batch))
        planner.end(total, took)
        seconds += took
    return tokens / seconds / batch


def fixed(policy, probability, steps, costs, draw):
    """A fixed plan, played out: tokens per second."""
    drafts, tokens, seconds = Drafts([0]), 0, 0.0
    for _ in range(steps):
        drafts, layout = policy.plan(drafts, 1000)
        accepted = len(come(draw, probability, layout.num_drafts))
        tokens += accepted
        seconds += float(costs.of(layout.num_tokens, 100))
        count = len(layout.rows_after(accepted))
        drafts = Drafts([0] * (1 + count), None, [probability] * count)
    return tokens / seconds


@pytest.mark.parametrize("probability", [0.02, 0.3, 0.6, 0.8, 0.95])
@pytest.mark.parametrize("costs", [FREE, DEAR, MIDDLING], ids=["free", "dear", "middling"])
def test_no_fixed_plan_is_faster(costs, probability):
    """Chances are the same at each offset here, so a fixed plan is as good as any; the planner must find it."""
    plans = [Policy(), *[Linear(K) for K in (4, 8)], *[Branches(K, m) for K in (4, 8) for m in (1, 2, 3, None)]]
    best = max(fixed(plan, probability, 3000, costs, random.Random(1)) for plan in plans)
    planner = Planner(costs, 8)
    play(planner, probability, 500, random.Random(2), costs)
    assert play(planner, probability, 3000, random.Random(3), costs) > 0.96 * best


def test_the_machine_and_the_text_decide():
    found = {}
    for name, costs in (("free", FREE), ("dear", DEAR), ("middling", MIDDLING)):
        for probability in (0.02, 0.9):
            planner = Planner(costs, 16)
            play(planner, probability, 400, random.Random(0), costs)
            found[name, probability] = planner.usual
    assert found["free", 0.9].startswith("all:16") and found["middling", 0.9] != "ar"
    assert {found["dear", 0.02], found["middling", 0.02], found["dear", 0.9]} == {"ar"}


def test_a_batch_fills_the_machine_by_itself():
    sizes = []
    for batch in (1, 4, 32):
        planner, sizes_of = Planner(MIDDLING, 16), []
        planner.end = lambda tokens, seconds, beside=0.0, kept=sizes_of, batch=batch: kept.append(tokens / batch)
        play(planner, 0.8, 200, random.Random(0), MIDDLING, batch)
        sizes.append(np.mean(sizes_of[50:]))
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > 2 * sizes[-1]


def test_shares_are_learned_and_forgotten():
    shares, draw = Shares([0.5, 0.5]), random.Random(0)
    for _ in range(500):
        shares.observe(0, draw.random() < 0.9)
    assert shares[0] == pytest.approx(0.9, abs=0.05) and shares[1] == 0.5
    for _ in range(1500):
        shares.observe(0, False)
    assert shares[0] < 0.03


def test_drafts_are_told_apart_by_what_is_known_of_them():
    acceptance = Acceptance()
    seen = set()
    for lag in (0, 1):
        for kind in (0, AGREE, DIFFER):
            for confidence in (0.0, 0.3, 1.0):
                seen |= set(acceptance.own_classes([confidence] * 4, lag, [kind] * 4))
    assert len(seen) == 2 * 3 * 3 * 3 - 1 * 3 * 3 and max(seen) < 8 * 3 * 2 * 3  # a late draft is never at offset 0
    copied = [acceptance.copied_classes(match, [0] * 5) for match in (1, 2, 7, 8)]
    assert copied[0][1:] == copied[1][:-1] and len(set(copied[2])) == 2 and len(set(copied[3])) == 1


def test_agreement_of_two_proposals():
    assert agreement([1, 2, 3], [1, 2, 4, 5]) == ([AGREE, AGREE, DIFFER], [AGREE, AGREE, DIFFER, 0])
    assert agreement([1], []) == ([0], []) and agreement([], []) == ([], [])
    assert agreement([1, 2], [3, 2]) == ([DIFFER, 0], [DIFFER, 0])


@pytest.mark.parametrize("seed", range(5))
def test_a_text_that_becomes_another_is_noticed(seed):
    planner, draw = Planner(MIDDLING, 8), random.Random(seed)
    fast = play(planner, 0.9, 2000, draw)
    plain = fixed(Policy(), 0.0, 10, MIDDLING, draw)
    assert play(planner, 0.0, 100, draw) > 0.6 * plain
    assert play(planner, 0.0, 500, draw) > 0.98 * plain and planner.usual == "ar"
    play(planner, 0.9, 2 * Planner.PROBE, draw)
    assert play(planner, 0.9, 500, draw) > 0.9 * fast


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("probability", [0.0, 0.6, 0.9])
def test_short_forwards_follow_a_routine(probability, batch):
    """Decisions that take longer than they save are made seldom, and that costs no speed."""
    quick = Costs(MIDDLING.sizes, MIDDLING.contexts, [[second / 100 for second in row] for row in MIDDLING.seconds])
    found = {}
    for costs in (quick, MIDDLING):
        planner, draw, chosen = Planner(costs, 8), random.Random(0), []
        play(planner, probability, 1000, draw, costs, batch, 4e-5)
        choose_one = planner.choose
        planner.choose = lambda *classes, choose_one=choose_one, chosen=chosen: chosen.append(1) or choose_one(*classes)
        speed = play(planner, probability, 1000, draw, costs, batch, 4e-5)
        found[costs is quick] = len(chosen) / (1000 * batch), speed
    assert found[True][0] < 0.2
    assert found[True][1] > 95 * found[False][1]


def test_a_routine_notices_another_text():
    """Short forwards: drafts that were right become worthless, and right again."""
    quick = Costs(MIDDLING.sizes, MIDDLING.contexts, [[second / 100 for second in row] for row in MIDDLING.seconds])
    planner, draw = Planner(quick, 8), random.Random(0)
    fast = play(planner, 0.9, 2000, draw, quick, deciding=4e-5)
    plain = fixed(Policy(), 0.0, 10, quick, draw)
    play(planner, 0.0, 200, draw, quick, deciding=4e-5)
    assert play(planner, 0.0, 500, draw, quick, deciding=4e-5) > 0.97 * plain
    play(planner, 0.9, 4 * Planner.PROBE, draw, quick, deciding=4e-5)
    assert play(planner, 0.9, 500, draw, quick, deciding=4e-5) > 0.9 * fast


def test_a_resting_planner_finds_copies():
    """Short forwards of a batch: what nobody decides is looked at now and then, in each sequence."""
    quick = Costs(MIDDLING.sizes, MIDDLING.contexts, [[second / 100 for second in row] for row in MIDDLING.seconds])
    planner, draw, batch = Planner(quick, 8), random.Random(0), 4
    planner.spend = lambda seconds: setattr(planner, "deciding", 5e-6)
    policies, seen, tokens = [following(planner) for _ in range(batch)], [0] * batch, []
    for step in range(6000):
        planner.begin(batch, 100)
        total = 0
        for n, policy in enumerate(policies):
            chance = 0.0 if step < 1000 else 0.95
            policy._copier.copy = lambda count, n=n: (seen.__setitem__(n, seen[n] + 1), Copied([0] * count, 8))[1]
            _, layout = policy.plan(Drafts([0]), 1000)
            final = come(draw, chance, layout.num_drafts)
            policy.observe(final, layout.num_drafts)
            total += layout.num_tokens
            tokens.append(len(final))
        planner.end(total, float(quick.of(total / batch, 100, batch)))
        if step == 999:
            assert not planner._here.decides and min(seen) > 0.8 * max(seen)
    assert np.mean(tokens[: 1000 * batch]) < 1.1 and np.mean(tokens[-1000 * batch :]) > 3


def test_decisions_are_made_where_they_pay():
    """Half of the drafts are sure, half are hopeless: verifying the sure ones is worth more than a decision takes."""
    planner, draw = Planner(DEAR, 8), random.Random(0)
    planner.spend = lambda seconds: setattr(planner, "deciding", 4e-5)
    policy = following(planner)
    policy._copier.copy = lambda count: NOTHING
    sizes = {0.99: [], 0.01: []}
    for step in range(1500):
        sure = draw.choice(list(sizes))
        planner.begin(1, 100)
        _, layout = policy.plan(Drafts([0] * 8, None, [sure] * 7), 1000)
        policy.observe(come(draw, sure, layout.num_drafts), layout.num_drafts)
        planner.end(layout.num_tokens, float(DEAR.of(layout.num_tokens, 100)))
        if step > 500:
            sizes[sure].append(layout.num_drafts)
    assert planner._here.decides
    assert 2 * np.mean(sizes[0.01]) < np.mean(sizes[0.99])


def test_a_size_that_is_slow_is_left():
    """Steps of more than 12 tokens take three times as long here as they were timed."""
    planner = Planner(MIDDLING, 8)
    play(planner, 0.9, 300, random.Random(0))
    assert planner.usual != "ar"
    cliff = Costs([1, 8, 12, 13, 272], [64], [[0.001], [0.002], [0.0023], [0.03], [0.1]])
    sizes = []
    play(planner, 0.9, 500, random.Random(0), cliff)
    end = planner.end
    planner.end = lambda tokens, seconds, beside=0.0: (sizes.append(tokens), end(tokens, seconds))
    play(planner, 0.9, 500, random.Random(0), cliff)
    assert np.mean(np.array(sizes) <= 12) > 0.95


def test_costs_that_were_timed_on_a_busy_machine_are_found_out():
    """Drafting was believed to cost a hundred times what it does, so nothing would ever draft but for the probes."""
    poisoned = Costs([1, 8, 32, 272], [64, 512], [[0.001, 0.001], *[[0.2, 0.2]] * 3])
    planner = Planner(poisoned, 8)
    play(planner, 0.9, 4000, random.Random(0))
    assert planner.usual != "ar"


@pytest.mark.parametrize("batch", [1, 4])
def test_drafts_are_tried_again_after_plain_steps(batch):
    """Seldom, once they are known to be worthless, and whatever the number of texts."""
    planner, drafted = Planner(DEAR, 8), []
    end = planner.end
    planner.end = lambda tokens, seconds, beside=0.0: (drafted.append(tokens >= batch + 4), end(tokens, seconds))
    play(planner, 0.0, 6 * Planner.PROBE, random.Random(0), DEAR, batch)
    rest = sum(drafted[2 * Planner.PROBE :])
    assert 2 <= rest <= 5


def repeated(planner, share, steps, draw):
    """Text that copies itself with this chance at each token, whose own drafts are wrong; return what was verified."""
    period = list(range(50))
    policy, taken, here, last = following(planner, period * 3), [], 0, 49
    drafts = Drafts([last])
    for _ in range(steps):
        planner.begin(1, 100)
        _, layout = policy.plan(drafts, 1000)
        taken.append(layout.num_drafts - 1)
        tokens = []
        while len(tokens) < layout.num_drafts:
            right = draw.random() < share
            tokens.append(period[here % 50] if right else 1000 + draw.randrange(10**6))
            here += 1
            if not right:
                break
        policy.observe(tokens, layout.num_drafts)
        count = len(layout.rows_after(len(tokens)))
        drafts = Drafts([tokens[-1], *[-1] * count], None, [0.1] * count)
        planner.end(layout.num_tokens, float(planner.clock.costs.of(layout.num_tokens, 100)))
    return taken


@pytest.mark.parametrize(("costs", "pays"), [(MIDDLING, True), (DEAR, False)])
def test_copies_are_taken_where_they_pay(costs, pays):
    """Each must give more tokens than its verification takes time, whatever the model's own drafts are worth."""
    taken = repeated(Planner(costs, 8), 0.85, 400, random.Random(0))
    assert np.mean(taken[200:]) > 2 if pays else np.mean(taken[200:]) < 0.1


def test_copies_are_learned_of_without_being_taken():
    planner = Planner(MIDDLING, 8)
    classes = planner.acceptance.copied_classes(8, [0])
    policy = following(planner)
    policy._decided = True
    planner.begin(1, 100)
    for _ in range(30):
        policy._copied, policy._classes = Copied([9], 8), ([], classes)
        policy.observe([8], 1)
    assert planner.acceptance.copied[classes[0]] < 0.3


def test_drafts_that_were_drawn_tell_only_where_they_were_verified():
    """A drawn draft that was not verified may be another token than the one that came, and yet acceptable."""
    for q, learned in ((None, 3), (torch.ones(3, 5) / 5, 1)):
        planner = Planner(FREE, 8)
        policy, seen = following(planner), []
        planner.acceptance.own.observe = lambda one, accepted, seen=seen: seen.append(accepted)
        planner.begin(1, 100)
        policy.plan(Drafts([0, 1, 2, 3], q, [0.5] * 3), 100)
        policy.observe([1, 2, 3], 2)
        assert len(seen) == learned


@pytest.mark.parametrize("seed", range(10))
def test_what_is_verified_does_not_depend_on_what_was_drawn(seed):
    """Else a drawn token that is dropped for its value would be rarer in the text than in the distribution of AR."""
    found = set()
    for tokens in itertools.product((8, 9, 10), repeat=2):  # 9 and 10 is what was copied
        draw = random.Random(seed)
        planner = Planner(draw.choice((FREE, MIDDLING, DEAR)), 8)
        for shares in (planner.acceptance.own, planner.acceptance.copied):
            shares._prior = [draw.random() for _ in shares._prior]
        planner.begin(1, 100)
        policy = following(planner, [5, 6, 7, 8, 9, 10, 11, 12, 5, 6, 7, 8])
        confidences = [draw.random(), draw.random()]
        drafts, layout = policy.plan(Drafts([8, *tokens], torch.ones(2, 20) / 20, confidences), 100)
        found.add((layout, drafts.q is None))
    assert len(found) == 1


def test_the_confidences_of_a_walk_do_not_depend_on_what_was_drawn():
    """A selector's distribution of a draft depends on the one drawn before it."""
    found = set()
    for seed in range(30):
        sequence = Sequence.__new__(Sequence)
        sequence.options = DecodeOptions(sampling=SamplingOptions(temperature=1.0, seed=seed))
        sequence._sampler = Sampler(sequence.options.sampling, [1], [], 6, torch.device("cpu"))
        sequence._policy, sequence._accepted, sequence._drafts = Planned(8), 1, Drafts([0])
        sequence._part = Part(0, 0, [0], ForwardLayout(1, (1,), 4))
        ids = torch.tensor([[1, 2], [3, 4], [5, 0]])
        scores = torch.tensor([[[0.0, 1], [0, 1]], [[5, 0], [0, 1]], [[9, 0], [0, 2]]])
        sequence.draft(torch.zeros(3, 6), offered=Drafted(ids, scores))
        found.add((tuple(sequence._drafts.confidences), tuple(sequence._drafts.tokens)))
    assert len({tokens for _, tokens in found}) > 3 and len({confidences for confidences, _ in found}) == 1


def test_a_match_counts_up_to_eight():
    copier = Copier([*range(20), *range(12)])
    assert copier.copy(3) == Copied([12, 13, 14], 8)
    assert Copier([*range(20), 90, *range(5, 10)]).copy(2) == Copied([10, 11], 5)
    assert Copier([1, 1]).copy(3).match == 1 and Copier([1, 2]).copy(3) == NOTHING
    assert Copier([4, 5, 6, 4, 5]).copy(0) == Copied([], 2)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_copying_changes_no_token(trained, temperature, monkeypatch):
    """Text that repeats itself, with a planner that copies whenever it can."""
    planner = Planner(FREE, longest_draft(trained))
    monkeypatch.setattr(engine, "planner_of", lambda model, batch_size: planner)
    monkeypatch.setattr(Acceptance, "MATCHED", (0.99,) * 9)
    planner.acceptance = Acceptance()
    prompt = [1, 2, 3, 4, 5, 6, 7] * 3
    sampling = SamplingOptions(temperature=temperature, seed=3)
    ar = generate(trained, prompt, DecodeOptions("ar", max_new_tokens=40, sampling=sampling)).token_ids
    found = generate(trained, prompt, DecodeOptions(max_new_tokens=40, sampling=sampling)).token_ids
    assert any("copies" in name for name in planner.used) and (temperature or found == ar)


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
    assert "tokens/forward" in explained and "gain from 1, 2, ... drafts" in explained


def test_steps_that_read_prompts_are_not_timed():
    planner = Planner(MIDDLING, 8)
    for _ in range(50):
        planner.begin(2, 100)
        planner.end(20, None)
    assert planner.clock.curve(False, 2, 100, 1)[1] == MIDDLING.of(1, 100, 2)


def test_without_a_tidar_section_it_is_autoregression(tiny):
    model = tiny("llama", tidar=False)
    plain = generate(model, [1, 2], DecodeOptions("ar", max_new_tokens=20))
    assert generate(model, [1, 2], DecodeOptions(max_new_tokens=20)).token_ids == plain.token_ids
