"""A draft/verify forward against slow references, what is kept in the cache, and broken folders."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tidar_megatron.errors import UserError
from tidar_megatron.inference.cache import KVPool
from tidar_megatron.inference.engine import Engine
from tidar_megatron.inference.forward import ForwardLayout, PackedForward, Part
from tidar_megatron.inference.loading import load_model
from tidar_megatron.inference.request import DecodeOptions
from tidar_megatron.inference.sequence import Sequence
from tidar_megatron.inference.wrapping import wrap_model

MASK = 47
FAMILIES = ["qwen3", "qwen2", "llama", "mistral", "gemma"]
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10}
PREFIX = [3, 14, 15, 9, 26, 5, 35]
DRAFTS = [8, 9, 7, 9]


def stock(model, token_ids, visible=None, positions=None, cache=None):
    """The transformers model with its own attention: (final hidden states, logits); ``visible`` bool [T, T]."""
    lm = model.causal_lm
    ours = lm.config._attn_implementation
    lm.set_attn_implementation("sdpa")
    try:
        with torch.no_grad():
            out = lm(
                torch.tensor([token_ids]),
                attention_mask=None if visible is None else visible[None, None],
                position_ids=None if positions is None else torch.tensor([positions]),
                past_key_values=cache,
                use_cache=cache is not None,
                output_hidden_states=True,
            )
    finally:
        lm.set_attn_implementation(ours)
    return out.hidden_states[-1][0], out.logits[0]


def draft_and_verify(model, plan):
    pool = KVPool(1, 64)
    with torch.inference_mode():
        model.forward(PackedForward(pool, [Part(0, 0, PREFIX, ForwardLayout(len(PREFIX)))]))
        hidden = model.forward(PackedForward(pool, [Part(0, len(PREFIX), DRAFTS, plan)]))
        return hidden, model.logits(hidden)


def brute_force_branch_mask(prefix, drafts, seen, draft_length):
    """The table of method.md for [prefix, drafts, one branch that saw the first ``seen`` drafts], cell by cell."""
    size = prefix + drafts + draft_length
    visible = torch.zeros(size, size, dtype=torch.bool)
    for query in range(size):
        for key in range(size):
            query_is_mask, key_is_mask = query >= prefix + drafts, key >= prefix + drafts
            if not query_is_mask:
                visible[query, key] = not key_is_mask and key <= query
            else:
                visible[query, key] = key_is_mask or key < prefix + seen
    return visible


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("family", FAMILIES)
def test_draft_logits_equal_the_full_causal_forward(tiny, family, dtype):
    model = tiny(family, dtype)
    _, logits = draft_and_verify(model, ForwardLayout(4, (1, 2, 3, 4), 5))
    _, expected = stock(model, PREFIX + DRAFTS)
    expected[:, MASK] = -torch.inf
    torch.testing.assert_close(logits[:4], expected[len(PREFIX) :], rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_norms_are_one_call_only_where_that_gives_the_same_bits(causal_lm, family, dtype):
    plain, copy = causal_lm(family, dtype), causal_lm(family, dtype)
    for lm in (plain, copy):
        for name, weight in lm.named_parameters():
            if "norm" in name:
                torch.nn.init.uniform_(weight, 0.5, 1.5, generator=torch.Generator().manual_seed(0))
    wrapped = wrap_model(copy).causal_lm
    fused = [module for module in wrapped.modules() if "forward" in vars(module)]
    per_layer = {"gemma": 0, "qwen3": 4}.get(family, 2)
    assert len(fused) == (2 * per_layer + (family != "gemma") if dtype == torch.float32 else 0)
    wrapped.set_attn_implementation("sdpa")
    ids = torch.tensor([PREFIX + DRAFTS])
    with torch.inference_mode():
        assert torch.equal(wrapped(ids).logits, plain(ids).logits)


def test_a_forward_that_somebody_replaced_is_called(causal_lm):
    """As accelerate does for a model that is spread over devices."""
    lm, calls = causal_lm("llama"), []
    forward = lm.base_model.forward
    lm.base_model.forward = lambda **inputs: calls.append(1) or forward(**inputs)
    model = wrap_model(lm)
    calls.clear()
    draft_and_verify(model, ForwardLayout(4))
    assert len(calls) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("family", FAMILIES)
def test_branches_equal_a_forward_of_the_branch_alone(tiny, family, dtype):
    model = tiny(family, dtype)
    length = 5
    for branches in [(1, 2, 3, 4), (2, 4), (3,)]:
        hidden, _ = draft_and_verify(model, ForwardLayout(4, branches, length))
        for i, seen in enumerate(branches):
            visible = brute_force_branch_mask(len(PREFIX), len(DRAFTS), seen, length)
            start = len(PREFIX) + seen
            positions = [*range(len(PREFIX) + len(DRAFTS)), *range(start, start + length)]
            expected, _ = stock(model, PREFIX + DRAFTS + [MASK] * length, visible, positions)
            got = hidden[4 + i * length : 4 + (i + 1) * length]
            torch.testing.assert_close(got, expected[-length:], rtol=0, atol=TOLERANCE[dtype])


def check_cache(model, text, engine, length):
    """The slot holds what transformers' own cache would, of all tokens but the certain one."""
    from transformers import DynamicCache

    assert length == len(text) - 1
    cache = DynamicCache(config=model.causal_lm.config)
    stock(model, text[:-1], cache=cache)
    for layer in range(2):
        keys, values = engine._forwards.pool.read(layer, 0, length)
        torch.testing.assert_close(keys, cache.layers[layer].keys[0], rtol=0, atol=1e-10)
        torch.testing.assert_close(values, cache.layers[layer].values[0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("mode", ["tidar", "linear", "ar", "lookup"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_pool_holds_exactly_the_committed_tokens(tiny, family, mode):
    model = tiny(family, torch.float64)
    engine = Engine(model, 1, 100)
    sequence = engine.submit(PREFIX, DecodeOptions(mode, None, "all", 30))
    for _ in range(7):
        engine.step()
        check_cache(model, PREFIX + sequence.tokens, engine, sequence.length)


@pytest.mark.parametrize("mode", ["tidar", "linear"])
def test_the_pool_of_a_model_whose_drafts_are_accepted(trained, prompts, mode):
    engine = Engine(trained, 1, 200)
    sequence = engine.submit(prompts[4], DecodeOptions(mode, 8, "all", 60))
    while not engine.is_idle:
        engine.step()
    check_cache(trained, prompts[4] + sequence.tokens, engine, sequence.length)


def test_a_step_allocates_nothing_that_grows_and_never_runs_out(trained, prompts):
    for options in (DecodeOptions("tidar", 9, "all", 90), DecodeOptions("tidar", 9, 3, 90), DecodeOptions("ar")):
        engine = Engine(trained, 1, Sequence(trained, prompts[4], options).room)
        engine.submit(prompts[4], options)
        engine.step()
        held, place = engine._forwards.pool.num_bytes, engine._forwards.pool.read(0, 0, 1)[0].data_ptr()
        while not engine.is_idle:
            engine.step()
        assert (engine._forwards.pool.num_bytes, engine._forwards.pool.read(0, 0, 1)[0].data_ptr()) == (held, place)


# ---- loading ------------------------------------------------------------------------------------------------------


def test_load(checkpoint):
    model = load_model(checkpoint)
    assert (model.mask_token_id, model.block_size, model.context_limit) == (257, 4, 128)
    assert model.eos_token_ids == {256}
    assert model.dtype == torch.float32
    assert model.device == torch.device("cpu")
    assert model.tokenizer.decode(model.tokenizer("né")["input_ids"]) == "né"
    assert load_model(checkpoint, "cpu", "float64").dtype == torch.float64


def test_eos_may_be_several(causal_lm):
    lm = causal_lm("llama")
    lm.generation_config.eos_token_id = [3, 5]
    assert wrap_model(lm).eos_token_ids == {3, 5}


def test_a_mask_token_that_was_learned_is_not_replaced(causal_lm, tmp_path):
    causal_lm("llama", torch.float32).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"was trained to draft with mask token {MASK}"):
        load_model(tmp_path, mask_token_id=3)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c.update(tidar={"block_size": 4}), "tidar needs mask_token_id and block_size"),
        (lambda c: c.update(tidar={"block_size": 4, "mask_token_id": 258}), "mask_token_id 258 is not an id below 258"),
        (lambda c: c.update(tidar={"block_size": 0, "mask_token_id": 257}), "block_size 0 is not a positive integer"),
        (lambda c: c.update(model_type="nosuch"), 'cannot load model_type "nosuch" as a causal LM'),
        (lambda c: c.update(model_type="vit"), 'cannot load model_type "vit" as a causal LM'),
    ],
)
def test_broken_config(checkpoint, tmp_path, edit, message):
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    edit(config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message) as error:
        load_model(tmp_path)
    assert "\n" not in str(error.value)


def test_broken_folder(checkpoint, tmp_path):
    with pytest.raises(UserError, match=r"has no config\.json; give a Hugging Face folder"):
        load_model(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json: is not JSON"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    with pytest.raises(UserError, match=r"holds no \*\.safetensors"):
        load_model(tmp_path)
    weights = load_file(checkpoint / "model.safetensors")
    del weights["model.layers.1.mlp.down_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.down_proj\.weight is missing from its weights"):
        load_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((checkpoint / "model.safetensors").read_bytes()[:20000])
    with pytest.raises(UserError, match="is not a complete safetensors file"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("device", "dtype", "message"),
    [
        ("warp", None, "device 'warp' cannot be used here"),
        pytest.param("cuda", None, "device 'cuda'", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="GPU")),
        (None, "int8", "dtype 'int8': use float32"),
        (None, "nonsense", "dtype 'nonsense'"),
    ],
)
def test_bad_device_or_dtype(checkpoint, device, dtype, message):
    with pytest.raises(UserError, match=message):
        load_model(checkpoint, device, dtype)
