"""What transformers' generate accepts, custom_generate serves with the same tokens or refuses by name."""

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast
from transformers.generation import (
    LogitsProcessorList,
    MaxLengthCriteria,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
    WatermarkingConfig,
)

from tidar_megatron.errors import UserError
from tidar_megatron.inference.custom_generate import generate
from tidar_megatron.inference.prepared import check_penalized

ONE = tensor([[1, 2, 3]])
TWO = tensor([[0, 0, *b"same"], [*b"the sa"]])
MASK = tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
PADDED = {"attention_mask": MASK, "pad_token_id": 0}


@pytest.fixture(scope="module")
def stock(checkpoint):
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    model.generation_config.eos_token_id = 255  # which it does not say
    return model


@pytest.fixture(scope="module")
def said(stock):
    """What the model says after ONE, and after each row of TWO."""
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": -1}
    one = stock.generate(ONE, **options)[0, 3:].tolist()
    assert len(set(one[:6])) == 6  # so that an end shows
    return one, stock.generate(TWO, **options, **PADDED)[:, 6:].tolist()


@pytest.fixture(scope="module")
def letters():
    """A letter for each id, for stop strings."""
    vocabulary = {chr(97 + n if n < 26 else 0x4E00 + n): n for n in range(258)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Whitespace(), decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def check_same(stock, ids, options, **more):
    options = {"max_new_tokens": 12, **options} if "generation_config" not in options else options
    inputs = () if ids is None else (ids,)
    expected = stock.generate(*inputs, **options)
    got = generate(*inputs, model=stock, plan="all:4", **options, **more)
    assert got.dtype == expected.dtype and torch.equal(got, expected), options
    return got


def test_ends_of_text_in_every_form(stock, said):
    """Tensors and numpy's numbers among them: they end the text, and are not overlooked."""
    end = said[0][5]
    forms = [end, tensor(end), tensor([end]), tensor([end, 5]), [tensor(end), tensor(5)], [np.int64(end), 7], (end, 5)]
    for eos in [*forms, np.int64(end), np.array([end, 5]), tensor(end, dtype=torch.int32), tensor([[end]])]:
        assert check_same(stock, ONE, {"eos_token_id": eos})[0, 3:].tolist() == said[0][:6]
        check_same(stock, ONE, {"generation_config": GenerationConfig(eos_token_id=eos, max_new_tokens=9)})
    for eos in (None, -1):
        assert check_same(stock, ONE, {"eos_token_id": eos})[0, 3:].tolist() == said[0]
    first = said[1][0][3]
    for padding in (0, tensor(0), tensor([7]), np.int64(9), None, -1):
        check_same(stock, TWO, {**PADDED, "eos_token_id": tensor([first]), "pad_token_id": padding})


@pytest.mark.parametrize(
    "options",
    [
        *({"max_new_tokens": count} for count in (np.int64(5), tensor(5), 5.0, 2.5, np.float32(4), True)),
        *({"max_new_tokens": None, "max_length": length} for length in (np.int64(9), tensor(9), 9.0, 7.5)),
        {"max_new_tokens": 4, "max_length": 9},
        {"min_new_tokens": 30},
        {"max_new_tokens": None},
        {"repetition_penalty": np.float64(1.9)},
        {"do_sample": True, "top_k": 1, "top_p": np.float64(0.9), "min_p": 0.1, "temperature": np.float64(0.7)},
        {"do_sample": True, "top_k": 1, "num_return_sequences": np.int64(3)},
        {"do_sample": np.bool_(True), "top_k": 1},
        {"do_sample": None},
        {"do_sample": False, "temperature": 0.0, "top_p": 0.3},
        {"logits_processor": LogitsProcessorList(), "stopping_criteria": StoppingCriteriaList()},
        {"logits_processor": [], "stopping_criteria": []},
        {"use_cache": False, "synced_gpus": False, "attention_mask": None, "past_key_values": None},
        {"num_return_sequences": 1, "num_beams": np.int64(1), "prefill_chunk_size": 2, "renormalize_logits": True},
        {"suppress_tokens": tensor([257])},
        *(
            {"generation_config": GenerationConfig(**fields)}
            for fields in (
                {},
                {"max_new_tokens": tensor(6), "nobody_knows_this": 3},
                {"guidance_scale": 1.0, "typical_p": 1.0, "penalty_alpha": 0.0, "length_penalty": 2.0},
                {"early_stopping": True, "no_repeat_ngram_size": 0, "cache_implementation": "static"},
            )
        ),
    ],
    ids=lambda options: "-".join(options) or None,
)
def test_options_are_what_transformers_takes_them_for(stock, said, options):
    ends = {"eos_token_id": tensor([said[0][2]])} if "min_new_tokens" in options else {}
    check_same(stock, ONE, {**options, **ends})


@pytest.mark.parametrize("mask", [MASK.bool(), MASK.int(), MASK.float(), MASK.double(), torch.ones(2, 6)])
def test_masks_of_every_type(stock, mask):
    check_same(stock, TWO, {"attention_mask": mask, "pad_token_id": 0})
    penalized = {"attention_mask": mask, "pad_token_id": 0, "repetition_penalty": 1.9}
    if Version(transformers.__version__) >= Version("5.23") or mask.all():
        check_same(stock, TWO, penalized)
    else:  # transformers counts the padding
        with pytest.raises(UserError, match="repetition_penalty: this version of transformers"):
            check_same(stock, TWO, penalized)


def test_a_penalty_that_counts_padding_on_the_left_is_refused():
    """The processor that transformers prepared before 5.23 does not leave the padding out."""
    with pytest.raises(UserError, match=r"this version of transformers would count the padding.*one prompt at a time"):
        check_penalized(RepetitionPenaltyLogitsProcessor(1.9), TWO, [list(b"same"), list(b"the sa")])
    check_penalized(RepetitionPenaltyLogitsProcessor(1.9), TWO[1:], [list(b"the sa")])


def test_inputs_in_every_form(stock):
    assert check_same(stock, ONE.int(), {}).dtype == torch.int64
    check_same(stock, None, {"input_ids": ONE, "attention_mask": torch.ones(1, 3)})
    check_same(stock, None, {"bos_token_id": tensor(3)})
    check_same(stock, None, {"bos_token_id": 3, "attention_mask": torch.ones(2, 1)})
    inner = tensor([[1, 1, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    check_same(stock, TWO, {"attention_mask": inner, "pad_token_id": 0})
    for options in ({}, {"pad_token_id": tensor(0)}):  # a pad token within a row is padding where nobody says else
        check_same(stock, tensor([[5, 0, 6], [7, 8, 9]]), options)


def test_stop_strings_are_transformers_own(stock, said, letters):
    """One that several tokens make up, one that begins in the prompt, one of several rows; behind the padding too."""
    one, (first, second) = said[0], said[1]
    for tokens in (one[4:6], one[7:8], [3, *one[:2]], [99]):
        options = {"stop_strings": letters.decode(tokens), "tokenizer": letters}
        got = check_same(stock, ONE, options)[0, 3:].tolist()
        assert got == (one if tokens == [99] else one[: one.index(tokens[-1]) + 1])
        check_same(stock, ONE, {**options, "eos_token_id": None})
        config = GenerationConfig(stop_strings=[letters.decode(tokens), "zz"], max_new_tokens=12)
        check_same(stock, ONE, {"generation_config": config, "tokenizer": letters})
    for tokens in (first[3:5], second[2:4], [int(TWO[0, -1]), first[0]]):
        check_same(stock, TWO, {**PADDED, "stop_strings": (letters.decode(tokens), "zz"), "tokenizer": letters})


def test_a_streamer_is_called_as_transformers_does(stock):
    class Streamer:
        def __init__(self):
            self.calls = []

        def put(self, value):
            self.calls.append((value.shape, value.dtype, value.tolist()))

        def end(self):
            self.calls.append("end")

    ours, theirs = Streamer(), Streamer()
    stock.generate(ONE, max_new_tokens=9, streamer=theirs)
    generate(ONE, model=stock, max_new_tokens=9, streamer=ours, plan="all:4")
    assert ours.calls == theirs.calls


REFUSED = [
    (ONE, {"eos_token_id": tensor([24.0])}, "eos_token_id"),
    (ONE, {"max_new_tokens": 0}, "max_new_tokens"),
    (ONE, {"max_length": 3, "max_new_tokens": None}, "max_length"),
    (ONE, {"do_sample": True, "temperature": 0.0}, "temperature"),
    (ONE, {"do_sample": True, "temperature": np.float32(0.7)}, "temperature"),
    (ONE, {"do_sample": True, "temperature": 1e-9}, "temperature"),
    (ONE, {"do_sample": True, "top_k": tensor(1)}, "top_k"),
    (ONE, {"do_sample": True, "top_p": 0.0}, "top-p"),
    (ONE, {"do_sample": True, "typical_p": 0.5}, "typical_p: not supported"),
    (ONE, {"do_sample": True, "top_h": 0.5}, "top_h: not supported"),
    (ONE, {"num_return_sequences": 2}, "num_return_sequences"),
    (ONE, {"penalty_alpha": 0.6, "top_k": 4}, "penalty_alpha: not supported"),
    (ONE, {"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens: not supported"),
    (ONE, {"guidance_scale": 2.0}, "guidance_scale: not supported"),
    (ONE, {"bad_words_ids": [[38]]}, "bad_words_ids: not supported"),
    (ONE, {"begin_suppress_tokens": tensor([38])}, "begin_suppress_tokens: not supported"),
    (ONE, {"remove_invalid_values": True}, "remove_invalid_values: not supported"),
    (ONE, {"watermarking_config": WatermarkingConfig()}, "watermarking_config: not supported"),
    (ONE, {"return_dict_in_generate": True}, "return_dict_in_generate: not supported"),
    (ONE, {"cache_implementation": "paged"}, "cache_implementation: not supported"),
    (ONE, {"logits_processor": LogitsProcessorList([lambda ids, scores: scores])}, "logits_processor: not supported"),
    (ONE, {"stopping_criteria": StoppingCriteriaList([MaxLengthCriteria(5)])}, "stopping_criteria: not supported"),
    (ONE, {"prefix_allowed_tokens_fn": lambda row, ids: [1]}, "prefix_allowed_tokens_fn: not supported"),
    (ONE, {"assistant_model": object()}, "assistant_model: not supported"),
    (ONE, {"inputs_embeds": torch.ones(1, 3, 32)}, "inputs_embeds: not supported"),
    (ONE, {"position_ids": ONE}, "position_ids: not supported"),
    (ONE, {"negative_prompt_ids": ONE}, "negative_prompt_ids: not supported"),
    (None, {}, "bos_token_id"),
    (ONE[0], {}, "input_ids"),
    (ONE[:, :0], {}, "input_ids"),
    (ONE[:0], {}, "input_ids"),
    (ONE.float(), {}, "input_ids"),
    ([[1, 2, 3]], {}, "input_ids"),
    (TWO, {"attention_mask": MASK * 2}, "attention_mask: must be 1 for text and 0"),
    (TWO, {"attention_mask": (1 - MASK.float()) * -1e9}, "attention_mask: must be 1 for text and 0"),
    (TWO, {"attention_mask": MASK[0]}, "attention_mask: must be a tensor of the same shape"),
    (TWO, {"attention_mask": MASK[1:]}, "attention_mask: must be a tensor of the same shape"),
    (TWO, {"attention_mask": MASK[:, 1:]}, "attention_mask: must be a tensor of the same shape"),
    (TWO, {"attention_mask": torch.ones(2, 9)}, "attention_mask: must be a tensor of the same shape"),
    (TWO, {"attention_mask": torch.ones(2, 1, 6, 6)}, "attention_mask: must be a tensor of the same shape"),
    (TWO, {"attention_mask": MASK.tolist()}, "attention_mask: must be a tensor of the same shape"),
    (TWO, {"attention_mask": MASK.flip(1)}, "attention_mask: row 0 ends with padding"),
    (TWO, {"attention_mask": torch.zeros(2, 6)}, "attention_mask: row 0 ends with padding"),
    (tensor([[5, 6, 0], [7, 8, 9]]), {"pad_token_id": 0}, "row 0 ends with padding"),
    (tensor([[5, 0, 6], [7, 8, 9]]), {"pad_token_id": 0, "repetition_penalty": 1.9}, "repetition_penalty"),
]


@pytest.mark.parametrize(("ids", "options", "message"), REFUSED, ids=[message for *_, message in REFUSED])
def test_what_is_refused_is_named_in_one_line(stock, ids, options, message):
    with pytest.raises(ValueError, match=message) as refused:
        generate(ids, model=stock, **{"max_new_tokens": 4, **options})
    assert "\n" not in str(refused.value)


def test_a_batch_with_stop_strings_needs_an_end_of_text(stock, letters):
    """Without one, transformers goes on with a row that has ended until all have."""
    with pytest.raises(UserError, match="stop_strings: a batch needs an eos_token_id"):
        generate(TWO, model=stock, max_new_tokens=4, stop_strings="a", tokenizer=letters, eos_token_id=None, **PADDED)
