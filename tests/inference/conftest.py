"""Tiny models of several families, a model whose drafts are accepted, a byte tokenizer, transformers' own answer."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tidar_megatron.attention_mask import INDEX, may_attend, training_layout
from tidar_megatron.huggingface.exported_engine import write_custom_generate
from tidar_megatron.inference.model import DecodeModel
from tidar_megatron.inference.wrapping import wrap_model

MASK = 47
BLOCK = 4
FAMILIES: dict[str, tuple[type, type, dict[str, Any]]] = {
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16, "num_key_value_heads": 2}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"num_key_value_heads": 1}),  # has a bias on q, k, v
    "llama": (LlamaConfig, LlamaForCausalLM, {"num_key_value_heads": 4}),
    "gemma": (GemmaConfig, GemmaForCausalLM, {"head_dim": 16, "num_key_value_heads": 1}),  # scaled embeddings
    "mistral": (MistralConfig, MistralForCausalLM, {"num_key_value_heads": 2, "sliding_window": None}),
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_config(family: str, tidar: bool = True, **changes: Any) -> Any:
    config_class, _, own = FAMILIES[family]
    values = {
        "vocab_size": 48,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        "initializer_range": 0.2,  # large, so that the greedy text depends on its context
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    config = config_class(**(values | own | changes))
    if tidar:
        config.tidar = {"mask_token_id": MASK, "block_size": BLOCK}
    return config


def make_causal_lm(
    family: str, dtype: torch.dtype = torch.float64, tidar: bool = True, **changes: Any
) -> PreTrainedModel:
    torch.manual_seed(0)
    model = FAMILIES[family][1](make_config(family, tidar, **changes))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.2)
    return model.to(dtype).eval()


@pytest.fixture(scope="session")
def causal_lm() -> Callable[..., PreTrainedModel]:
    """Makes a randomly initialised transformers model; the same arguments give the same weights."""
    return make_causal_lm


@pytest.fixture(scope="session")
def tiny() -> Callable[..., DecodeModel]:
    """Makes such a model wrapped for decoding, once for each set of arguments."""
    made: dict[tuple[Any, ...], DecodeModel] = {}

    def make(family: str = "qwen3", dtype: torch.dtype = torch.float64, **changes: Any) -> DecodeModel:
        key = (family, dtype, *sorted(changes.items()))
        if key not in made:
            made[key] = wrap_model(make_causal_lm(family, dtype, **changes))
        return made[key]

    return make


@pytest.fixture(scope="session")
def stock_generate() -> Callable[..., list[int]]:
    """Greedy tokens of transformers' own ``generate`` with its own attention, mask token suppressed."""

    def run(model: DecodeModel, prompt: list[int], max_new_tokens: int, eos: int | None = None) -> list[int]:
        lm = model.causal_lm
        ours = lm.config._attn_implementation
        lm.set_attn_implementation("sdpa")
        try:
            out = lm.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                do_sample=False,
                max_new_tokens=max_new_tokens,
                suppress_tokens=[MASK],
                eos_token_id=eos,
                pad_token_id=0,
            )
        finally:
            lm.set_attn_implementation(ours)
        return out[0, len(prompt) :].tolist()

    return run


def draw_text(rng: random.Random, length: int) -> list[int]:
    """Words of 3 to 8 letters, each spelt in one way, in random order: easy to draft within a word, hard across."""
    text: list[int] = []
    while len(text) < length:
        word = rng.randrange(6)
        text += [word] + [6 + (word * 7 + i * 5) % 30 for i in range(2 + word)]
    return text[:length]


@pytest.fixture(scope="session")
def trained() -> DecodeModel:
    """A model trained for seconds on :func:`draw_text`, so that drafts are accepted: sometimes few, sometimes all."""
    torch.set_num_threads(1)
    lm = make_causal_lm("qwen3", torch.float32, initializer_range=0.05)
    lm.set_attn_implementation("sdpa")
    S, B, rng = 48, 8, random.Random(0)
    places = torch.arange(S)
    layout = training_layout(torch.zeros_like(places), places, B)
    mask = may_attend(layout, layout)[None, None]
    optimizer = torch.optim.AdamW(lm.parameters(), lr=5e-3)
    for _ in range(150):
        clean = torch.tensor([draw_text(rng, S) for _ in range(8)])
        out = lm(
            torch.cat([clean, torch.full_like(clean, MASK)], 1),
            attention_mask=mask.expand(8, -1, -1, -1),
            position_ids=layout[None, :, INDEX].long(),
            use_cache=False,
        ).logits
        loss = F.cross_entropy(out[:, : S - 1].flatten(0, 1), clean[:, 1:].flatten())
        loss = loss + F.cross_entropy(out[:, S:].flatten(0, 1), clean.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return wrap_model(lm.double())


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    rng = random.Random(1)
    return [draw_text(rng, length) for length in (1, 2, 5, 9, 16, 23, 30, 31)]


@pytest.fixture(scope="session")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Ids 0..255 are the bytes (in the byte-level alphabet's order), 256 ends the text, 257 is the mask token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|mask|>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", mask_token="<|mask|>")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, byte_tokenizer: PreTrainedTokenizerFast) -> Path:
    """An exported folder: a random Qwen3 over bytes with a ``tidar`` section."""
    folder = tmp_path_factory.mktemp("checkpoint")
    lm = make_causal_lm("qwen3", torch.float32, vocab_size=258, eos_token_id=256, initializer_range=0.4)
    lm.config.tidar = {"mask_token_id": 257, "block_size": BLOCK}
    lm.generation_config.suppress_tokens = [257]
    lm.save_pretrained(folder)
    byte_tokenizer.save_pretrained(folder)
    write_custom_generate(folder)
    return folder
