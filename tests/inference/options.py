"""Options and prompts as the tests name them."""

import random

from tests.inference.conftest import MASK
from tidar_megatron.inference.request import DecodeOptions


def tidar(draft_length=None, branches="all", max_new_tokens=24, **more):
    return DecodeOptions("tidar", draft_length, branches, max_new_tokens, **more)


def auto(max_new_tokens=24, **more):
    return DecodeOptions("auto", max_new_tokens=max_new_tokens, **more)


def ar(max_new_tokens=24, **more):
    return DecodeOptions("ar", max_new_tokens=max_new_tokens, **more)


def random_prompt(length, seed=0):
    rng = random.Random(seed)
    return [rng.randrange(MASK) for _ in range(length)]
