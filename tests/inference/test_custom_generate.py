"""The exported folder decodes with transformers alone: the engine's own files, the same tokens."""

import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from tidar_megatron.errors import UserError
from tidar_megatron.huggingface.exported_engine import MODULES, source_of, write_custom_generate
from tidar_megatron.inference.custom_generate import generate

ALONE = """
import sys
import torch
from transformers import AutoModelForCausalLM
folder = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(folder)
texts = [b"hello wor", b"ab", b"the same the sa"]
width = max(map(len, texts))
ids = torch.tensor([[0] * (width - len(text)) + list(text) for text in texts])
mask = torch.tensor([[0] * (width - len(text)) + [1] * len(text) for text in texts])
options = dict(input_ids=ids, attention_mask=mask, max_new_tokens=40, pad_token_id=0, do_sample=False)
stock = model.generate(**options)
remote = dict(custom_generate=folder, trust_remote_code=True)
for plan in ("auto", "all:8", "2:8", "linear:8", "lookup:4", "ar"):
    assert torch.equal(model.generate(**options, plan=plan, **remote), stock), plan
assert torch.equal(model.generate(**options), stock)
one = model.generate(ids[2:], max_length=30, do_sample=False)
assert torch.equal(model.generate(ids[2:], max_length=30, do_sample=False, **remote), one)
first = int(stock[0, width])
eos = dict(options, eos_token_id=first)
assert torch.equal(model.generate(**eos, **remote), model.generate(**eos))
for form in (torch.tensor(first), torch.tensor([first]), [torch.tensor(first)]):
    assert torch.equal(model.generate(**dict(eos, eos_token_id=form), **remote), model.generate(**eos))
drawn = []
for seed in (1, 1, 2):
    torch.manual_seed(seed)
    sampling = dict(options, do_sample=True, temperature=0.8, top_p=0.9, num_return_sequences=2, plan="2:8")
    drawn.append(model.generate(**sampling, **remote))
assert drawn[0].shape == (6, width + 40) and torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
assert not any(name.startswith("tidar_megatron") for name in sys.modules)
loaded = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
assert torch.equal(loaded.generate(ids[2:], max_length=30, do_sample=False), one)
for plan in ("auto", "2:8"):  # the README's call on a model that has this generate already
    assert torch.equal(loaded.generate(ids[2:], max_length=30, do_sample=False, plan=plan, **remote), one)
print("alone:", sum(name.startswith("transformers_modules") for name in sys.modules))
"""


def test_the_files_are_the_package_s_own(checkpoint):
    folder = Path(checkpoint) / "custom_generate"
    assert {path.stem for path in folder.glob("*.py")} == set(MODULES)
    for name in MODULES:
        text = (folder / f"{name}.py").read_text()
        assert text == source_of(name)
        assert "from tidar_megatron" not in text and "import tidar_megatron" not in text
        assert set(re.findall(r"(?m)^from \.(\w+) import", text)) <= set(MODULES), "a module that no export carries"


@pytest.mark.process
def test_transformers_alone_decodes_with_them(checkpoint, tmp_path):
    script = tmp_path / "alone.py"
    script.write_text(ALONE)
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), str(checkpoint)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "alone:" in done.stdout


@pytest.fixture(scope="module")
def stock(checkpoint):
    return AutoModelForCausalLM.from_pretrained(checkpoint)


def test_the_model_is_left_as_it_was(stock):
    ids = torch.tensor([[1, 2, 3]])
    stock.train()
    attention = stock.config._attn_implementation
    generate(ids, model=stock, max_new_tokens=3)
    assert stock.training and stock.config._attn_implementation == attention
    assert not any("forward" in vars(module) for module in stock.modules())  # norms compute as transformers' own
    stock.model.layers[0].eval()
    generate(ids, model=stock, max_new_tokens=3)
    assert stock.training and not stock.model.layers[0].training
    pickle.dumps(stock)
    assert all(parameter.requires_grad for parameter in stock.parameters())
    with pytest.raises(UserError, match="mask token"):
        generate(torch.tensor([[stock.config.tidar["mask_token_id"]]]), model=stock)
    assert stock.config._attn_implementation == attention
    stock.eval()


def test_a_streamer_sees_the_prompt_and_then_all_tokens(stock):
    class Streamer:
        def __init__(self):
            self.seen, self.ended = [], False

        def put(self, value):
            self.seen += value.flatten().tolist()

        def end(self):
            self.ended = True

    streamer = Streamer()
    made = generate(torch.tensor([[1, 2, 3]]), model=stock, max_new_tokens=9, streamer=streamer)
    assert streamer.seen == made[0].tolist() and streamer.ended


def test_minimum_and_penalty_as_in_transformers(stock):
    ids = torch.tensor([list(b"abcabcab")])
    eos = int(stock.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=-1)[0, -1])
    for options in ({"min_new_tokens": 6}, {"min_length": 12}, {"repetition_penalty": 1.5}):
        config = GenerationConfig(
            max_new_tokens=12, do_sample=False, eos_token_id=eos, pad_token_id=0, suppress_tokens=[257], **options
        )
        expected = stock.generate(ids, generation_config=config)
        assert torch.equal(generate(ids, config, model=stock, plan="all:4"), expected), options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 4}, "num_beams: not supported"),
        ({"no_repeat_ngram_size": 2}, "no_repeat_ngram_size: not supported"),
        ({"no_repeat_ngram_size": 1}, "no_repeat_ngram_size: not supported"),
        ({"forced_eos_token_id": 0}, "forced_eos_token_id: not supported"),
        ({"max_time": 1.0}, "max_time: not supported"),
        ({"output_scores": True}, "output_scores: not supported"),
        ({"logits_processor": [print]}, "logits_processor: not supported"),
        ({"nonsense": 3}, "nonsense: not supported"),
        ({"suppress_tokens": [3]}, "suppress_tokens: only the mask token"),
        ({"plan": "fast"}, "plan 'fast'"),
        ({"do_sample": True, "temperature": -1.0}, "temperature"),
        ({"stop_strings": "x"}, "a tokenizer is needed"),
    ],
)
def test_what_is_not_served_is_named(stock, options, message):
    with pytest.raises(ValueError, match=message):  # transformers' own, where it refuses as well
        generate(torch.tensor([[1, 2]]), model=stock, **options)


def test_batches_have_no_streamer(stock):
    with pytest.raises(UserError, match="one row"):
        generate(torch.ones(2, 3, dtype=torch.int64), model=stock, streamer=object())


def test_the_folder_must_be_new(tmp_path):
    write_custom_generate(tmp_path)
    with pytest.raises(FileExistsError):
        write_custom_generate(tmp_path)


def test_padding_is_no_text_unless_it_ends_texts(stock):
    ids = torch.tensor([[0, 0, *b"same"], [*b"the sa"]])
    for more in ({}, {"eos_token_id": 0}, {"eos_token_id": [5, 0]}):
        options = {"max_new_tokens": 12, "pad_token_id": 0, "do_sample": False, "suppress_tokens": [257], **more}
        assert torch.equal(generate(ids, model=stock, plan="2:4", **options), stock.generate(ids, **options)), more


def test_it_is_said_where_the_context_ends_a_text(stock):
    with pytest.warns(UserWarning, match="context of 128 tokens is full"):
        made = generate(torch.tensor([[1] * 120]), model=stock, max_new_tokens=20, eos_token_id=None)
    assert made.shape == (1, 128)


def test_a_norm_that_somebody_replaced_is_left(stock):
    norm = stock.model.norm
    forward = norm.forward
    norm.forward = lambda hidden: forward(hidden)
    theirs = norm.forward
    generate(torch.tensor([[1, 2]]), model=stock, max_new_tokens=3)
    assert norm.forward is theirs
    del norm.forward


@pytest.mark.parametrize("eos", [[250, 105], None])
def test_what_is_left_open_is_transformers_choice(stock, monkeypatch, eos):
    """How many tokens, which end a text, which pads it: with a model's own settings, and with a part of others."""
    texts = torch.tensor([list(b"hello wo"), list(b"the same")])
    first = int(stock.generate(texts[:1], max_new_tokens=4, do_sample=False, eos_token_id=-1)[0, -1])
    theirs = GenerationConfig(eos_token_id=[first, 250], suppress_tokens=[stock.config.tidar["mask_token_id"]])
    monkeypatch.setattr(stock, "generation_config", theirs)
    for options in (
        {},
        {"eos_token_id": eos},
        {"max_length": 20},
        {"generation_config": GenerationConfig(max_new_tokens=30)},
    ):
        assert torch.equal(generate(texts, model=stock, **options), stock.generate(texts, **options)), options


def test_a_model_that_cannot_be_served_is_left_as_it_was(stock, monkeypatch):
    attention = stock.config._attn_implementation
    monkeypatch.setattr(stock.config, "tidar", {"block_size": "many", "mask_token_id": -5})
    with pytest.raises(UserError):
        generate(torch.tensor([[1, 2]]), model=stock)
    assert stock.config._attn_implementation == attention
