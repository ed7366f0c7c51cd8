"""Which outcomes get a branch, and what prompt-lookup finds."""

import random

from tidar_megatron.inference.drafting import Drafts, Lookup, likeliest_outcomes


def test_likeliest_outcomes():
    # exactly 1: 0.1, 2: 0.9 * 0.5 = 0.45, 3: 0.45 * 0.2 = 0.09, all 4: 0.36
    assert likeliest_outcomes([0.9, 0.5, 0.8], 1) == (2,)
    assert likeliest_outcomes([0.9, 0.5, 0.8], 2) == (2, 4)
    assert likeliest_outcomes([0.9, 0.5, 0.8], 3) == (1, 2, 4)
    assert likeliest_outcomes([0.9, 0.5, 0.8], 9) == (1, 2, 3, 4)
    assert likeliest_outcomes([], 1) == (1,)


def brute_force_lookup(text, count):
    for length in (4, 3, 2, 1):
        for start in range(len(text) - length - 1, -1, -1):
            if text[start : start + length] == text[len(text) - length :]:
                return text[start + length : start + length + count]
    return []


def test_lookup_finds_the_latest_longest_match():
    rng = random.Random(0)
    for _ in range(200):
        prompt = [rng.randrange(3) for _ in range(rng.randrange(1, 12))]
        drafts = Lookup(prompt, 6)
        text = list(prompt)
        for _ in range(6):
            emitted = [rng.randrange(3) for _ in range(rng.randrange(1, 4))]
            text += emitted
            drafts.observe(emitted, 0)
            assert drafts.plan(Drafts([text[-1]]), 9)[0].tokens[1:] == brute_force_lookup(text, 5)
