"""The lean forward computes what transformers' modules do, steps back where they changed, and leaves no bit open."""

import copy

import pytest
import torch

from tests.conftest import THOROUGH
from tests.inference.conftest import make_causal_lm
from tidar_megatron.evaluation.bitwise import check_bitwise
from tidar_megatron.evaluation.certificate import plans
from tidar_megatron.inference.cache import KVPool, rounded_keys
from tidar_megatron.inference.embedding import stored_embedding
from tidar_megatron.inference.engine import generate
from tidar_megatron.inference.forward import ForwardLayout, PackedForward, Part
from tidar_megatron.inference.lean import _rotated, is_lean, use_lean_forward
from tidar_megatron.inference.loading import load_model
from tidar_megatron.inference.products import can_pack
from tidar_megatron.inference.request import DecodeOptions
from tidar_megatron.inference.wrapping import wrap_model

LAYOUT = ForwardLayout(5, (1, 3), 4)
PROMPTS = [[1, 2, 3, 4, 5, 6] * 9, [7, 8, 9], [5, 3] * 30]


def hidden(model, layout=LAYOUT):
    pool = KVPool(1, 100)
    with torch.inference_mode():
        model.forward(PackedForward(pool, [Part(0, 0, range(1, 11), ForwardLayout(10))]))
        return model.forward(PackedForward(pool, [Part(0, 10, range(layout.num_drafts), layout)]))


@pytest.mark.parametrize("take", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_it_equals_the_modules(family, dtype, take):
    torch.manual_seed(0)
    causal_lm = make_causal_lm(family, dtype)
    with torch.no_grad():
        for name, weight in causal_lm.named_parameters():
            if name.endswith(("norm.weight", "bias")):
                weight.normal_(1, 0.3)
    model = wrap_model(causal_lm)
    assert model.lean is not None
    model.lean = None
    expected = hidden(model)
    with torch.inference_mode():
        logits = model.logits(expected)
    use_lean_forward(model, take)
    assert model.lean is not None
    allowed = {torch.float32: 1e-5, torch.bfloat16: 0.03}[dtype]
    torch.testing.assert_close(hidden(model), expected, rtol=0, atol=allowed * expected.abs().max().item())
    with torch.inference_mode():
        found = model.logits(expected)
    seen = logits.isfinite()  # all but the mask token's
    torch.testing.assert_close(found[seen], logits[seen], rtol=0, atol=allowed * logits[seen].abs().max().item())


def test_in_float64_the_modules_run():
    """Their norms are float32, whatever the dtype."""
    assert wrap_model(make_causal_lm("llama", torch.float64)).lean is None


def test_changes_to_weights_in_memory_have_effect():
    causal_lm = make_causal_lm("llama", torch.float32)
    model = wrap_model(causal_lm)
    before = hidden(model)
    with torch.no_grad():
        causal_lm.model.layers[1].self_attn.k_proj.weight.mul_(1.5)
    after = hidden(model)
    assert not torch.equal(before, after)
    model.lean = None
    torch.testing.assert_close(after, hidden(model))


@pytest.mark.parametrize("change", ["hook", "forward", "class", "norm"])
def test_changed_modules_run_themselves(change):
    causal_lm = make_causal_lm("llama", torch.float32)
    assert is_lean(causal_lm)
    layer = causal_lm.model.layers[0]
    if change == "hook":
        layer.mlp.register_forward_hook(lambda module, given, out: out)
    elif change == "forward":
        layer.self_attn.q_proj.forward = lambda x: x
    elif change == "class":
        layer.mlp.up_proj = torch.nn.Sequential(layer.mlp.up_proj)
    else:
        layer.input_layernorm = torch.nn.RMSNorm(causal_lm.config.hidden_size)
    assert not is_lean(causal_lm)


@pytest.mark.parametrize("change", ["hook", "module"])
def test_modules_that_change_later_run_themselves(change):
    causal_lm = make_causal_lm("llama", torch.float32)
    model = wrap_model(causal_lm)
    options = DecodeOptions("ar", max_new_tokens=5)
    before = generate(model, [1, 2, 3], options).token_ids
    assert model.lean is not None
    mlp, seen = causal_lm.model.layers[0].mlp, []
    if change == "hook":
        mlp.register_forward_hook(lambda *arguments: seen.append(1))
    else:
        mlp.up_proj = copy.deepcopy(mlp.up_proj)
    assert generate(model, [1, 2, 3], options).token_ids == before
    assert model.lean is None and bool(seen) == (change == "hook")


def test_a_model_whose_class_computes_otherwise_runs_itself(monkeypatch):
    """The classes are known and nothing is hooked; that their outputs differ is what decides."""
    model = wrap_model(make_causal_lm("llama", torch.float32))
    assert model.lean is not None
    monkeypatch.setattr("tidar_megatron.inference.lean._rotated", lambda x, cos, sin, weight, eps: x.contiguous())
    model.lean = None
    use_lean_forward(model)
    assert model.lean is None


def test_taken_weights_are_gone(checkpoint):
    model = load_model(checkpoint)
    assert model.causal_lm.model.layers[0].mlp.up_proj.weight.is_meta
    with pytest.raises(RuntimeError, match="keep_weights=True"):
        model.causal_lm(torch.tensor([[1, 2]]))
    kept = load_model(checkpoint, keep_weights=True)
    kept.causal_lm.set_attn_implementation("sdpa")
    assert kept.causal_lm(torch.tensor([[1, 2]])).logits.isfinite().all()


SMALL = {"plain": 2**20, "laid out": 0}
FORMS = [("float32", "plain"), ("bfloat16", "laid out")]
FORMS += [("float32", "laid out"), ("bfloat16", "plain")] if THOROUGH else []


@pytest.mark.parametrize(("dtype", "form"), FORMS)
def test_every_plan_has_the_same_bits(checkpoint, dtype, form, monkeypatch):
    """Prompts are read in pieces and in batches too; the processor's products must have the property."""
    monkeypatch.setattr("tidar_megatron.inference.lean.SMALL", SMALL[form])
    if not can_pack(torch.empty(0, dtype=getattr(torch, dtype))):
        pytest.skip(f"oneDNN has no {dtype} products on this processor")
    model = load_model(checkpoint, dtype=dtype)
    runs = plans([4], drafts=True)
    report = check_bitwise(model, PROMPTS, 24, runs)
    assert report.holds, [run for run in report.runs if run.equal < len(PROMPTS)]
    assert len(report.runs) == 4 * len({"ar", *runs}) - 1


def test_a_difference_is_found(checkpoint, monkeypatch):
    model = load_model(checkpoint, dtype="float32")
    real = model.logits
    monkeypatch.setattr(model, "logits", lambda rows: real(rows) + 1e-6 * (len(rows) > 1))
    report = check_bitwise(model, PROMPTS, 8, plans([4], drafts=True))
    assert not report.holds
    worst = min(report.runs, key=lambda run: run.equal)
    assert worst.equal < len(PROMPTS) and worst.same_tokens == len(PROMPTS) and worst.first is not None


def test_keys_are_read_in_sizes_that_leave_the_bits():
    sizes = [rounded_keys(length) for length in range(2000)]
    assert sizes[:3] == [0, 64, 64] and sizes == sorted(sizes)
    assert all(0 <= size - length <= 192 for length, size in enumerate(sizes))
    assert {size % 512 for size in sizes} == {0, 64, 128, 192, 384}


def test_a_tied_embedding_is_read_from_the_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("tidar_megatron.inference.embedding.WORTH", 0)
    monkeypatch.setattr("tidar_megatron.inference.lean.SMALL", 0)  # plain products need no laid out output layer
    make_causal_lm("llama", torch.bfloat16, tie_word_embeddings=True).save_pretrained(tmp_path)
    model, kept = load_model(tmp_path, dtype="float32"), load_model(tmp_path, dtype="float32", keep_weights=True)
    assert model.causal_lm.model.embed_tokens.weight.is_meta and model.causal_lm.lm_head.weight.is_meta
    found, expected = hidden(model), hidden(kept)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    with torch.inference_mode():
        torch.testing.assert_close(model.logits(found), kept.logits(expected), rtol=0, atol=1e-4)


def test_an_embedding_stays_in_memory_where_the_output_layer_is_not_laid_out(tmp_path, monkeypatch):
    """Rows from the file are on the CPU, so a GPU, which lays nothing out, keeps the embedding."""
    monkeypatch.setattr("tidar_megatron.inference.embedding.WORTH", 0)
    causal_lm = make_causal_lm("llama", torch.float32, tie_word_embeddings=True)
    causal_lm.save_pretrained(tmp_path)
    assert stored_embedding(tmp_path, causal_lm) is not None
    monkeypatch.setattr("tidar_megatron.inference.embedding.can_pack", lambda weight: False)
    assert stored_embedding(tmp_path, causal_lm) is None


def test_what_a_gpu_compiles_is_one_graph():
    """A break in the graph would be a second kernel, or an error of ``fullgraph``; shapes are dynamic."""
    compiled = torch.compile(_rotated, backend="eager", fullgraph=True, dynamic=True)
    for tokens, weight in ((1, None), (5, None), (5, torch.rand(3, 1, 8)), (7, torch.rand(3, 1, 8))):
        x, cos, sin = torch.randn(1, tokens, 3, 8).transpose(1, 2), torch.rand(1, tokens, 8), torch.rand(1, tokens, 8)
        torch.testing.assert_close(compiled(x, cos, sin, weight, 1e-6), _rotated(x, cos, sin, weight, 1e-6))
