"""Quantized weights: the products, their bits, the cache, what decodes with them, and what refuses them."""

import itertools
import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import THOROUGH
from tests.inference.conftest import make_causal_lm
from tests.programs import call
from tidar_megatron.benchmark.energy import Sizes
from tidar_megatron.errors import UserError
from tidar_megatron.evaluation.bitwise import check_bitwise
from tidar_megatron.evaluation.certificate import plans
from tidar_megatron.inference import costs, quantized, quantizing
from tidar_megatron.inference.loading import load_model
from tidar_megatron.inference.quantizing import bits_of, quantize_model
from tidar_megatron.inference.scoring import score
from tidar_megatron.inference.wrapping import wrap_model

NAMES = ("int8", "int4")
DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TIDAR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def saved(tmp_path_factory, byte_tokenizer):
    folder = tmp_path_factory.mktemp("saved")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 258}
    causal_lm = make_causal_lm("qwen3", torch.float32, **sizes, tie_word_embeddings=True)
    causal_lm.config.tidar = {"mask_token_id": 257, "block_size": 4}
    causal_lm.save_pretrained(folder)
    byte_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A folder with a Qwen3 over bytes, whose output layer is its embedding."""
    return shutil.copytree(saved, tmp_path / "model")


def made(name, weight, bias=None, inputs=None):
    """Return the quantized product of a weight, the weight that it has, and the factors of its inputs."""
    if name == "int8":
        inputs = torch.linspace(0.1, 10, weight.shape[1]) if inputs is None else inputs
        values, scales, factors = quantized.to_int8(weight, inputs)
        of = quantized.int8_product(values, scales, factors, bias, weight.dtype).of
        return of, values.float() * scales[:, None] * factors, factors
    values, scales = quantized.to_int4(weight)
    of = quantized.int4_product(values, scales, bias, weight.dtype).of
    return of, dequantized_int4(values, scales), torch.ones(weight.shape[1])


def dequantized_int4(values, scales):
    each = torch.stack([values >> 4, values & 15], -1).flatten(1).float()
    scale, zero = scales.float().repeat_interleave(quantized.GROUP, 0).unbind(-1)
    return (each - 8) * scale.T + zero.T


def in_steps(rows, factors):
    """Return rows as int8's products see them: times the factors, whole 127ths of their largest value."""
    step = (rows * factors).abs().amax(-1, keepdim=True) / 127
    return (rows * factors / step).round() * step / factors


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_product_is_that_of_the_dequantized_weights(name, dtype):
    torch.manual_seed(0)
    weight, bias = torch.randn(100, 192).to(dtype), torch.randn(100).to(dtype)
    rows = torch.randn(80, 192).to(dtype)
    of, wide, factors = made(name, weight, bias)
    assert ((wide - weight.float()).norm() / weight.float().norm()) < {"int8": 0.02, "int4": 0.1}[name]
    seen = in_steps(rows.float(), factors) if name == "int8" else rows.float()
    expected = seen @ wide.T + bias.float()
    found = of(rows)
    assert found.dtype == dtype and found.shape == (80, 100)
    allowed = {torch.float32: 1e-5, torch.bfloat16: 0.01}[dtype]
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=allowed * expected.abs().max().item())
    for count in range(1, 73):
        assert torch.equal(of(rows[:count]), found[:count])  # in every bit


def test_a_row_of_zeros_gives_zeros():
    for weight in (torch.zeros(64, 32), torch.ones(64, 32)):
        of, _, _ = made("int8", weight, inputs=torch.zeros(32))
        assert torch.equal(of(torch.zeros(2, 32)), torch.zeros(2, 64))
    assert torch.equal(of(torch.ones(2, 32)), torch.full((2, 64), 32.0))


def test_unequal_inputs_are_balanced():
    """One input a hundred times as large as the others would leave those hardly any steps."""
    torch.manual_seed(0)
    weight, rows = torch.randn(64, 96), torch.randn(50, 96)
    rows[:, 3] *= 100
    weight[:, 3] /= 10

    def error(inputs):
        of, _, _ = made("int8", weight, inputs=inputs)
        return (of(rows) - rows @ weight.T).norm()

    assert error(rows.abs().amax(0)) < 0.5 * error(weight.abs().amax(0))  # the latter gives factors of 1


def test_the_largest_inputs_are_found_in_the_order_of_the_products():
    causal_lm = make_causal_lm("llama", torch.float32)
    with torch.no_grad():
        causal_lm.model.layers[1].post_attention_layernorm.weight[5] = 100
        causal_lm.model.norm.weight[7] = 100
    model = wrap_model(causal_lm)
    lean = model.lean
    found = quantizing.largest_inputs(model)
    assert [len(inputs) for inputs in found] == [32, 32, 32, 48] * 2 + [32]
    assert found[6].argmax() == 5 and found[8].argmax() == 7
    assert model.lean is lean and all(
        torch.equal(a, b) for a, b in zip(found, quantizing.largest_inputs(model), strict=True)
    )
    quantize_model(model, "int8")  # no hook is left


def test_weights_are_not_changed():
    weight = torch.randn(64, 32)
    before = weight.clone()
    for name in NAMES:
        made(name, weight)
    assert torch.equal(weight, before)


def test_without_exact_integers_activations_keep_their_dtype(monkeypatch):
    """Processors without VNNI run torch's kernel for 8-bit weights alone."""
    torch.manual_seed(0)
    rows = torch.randn(5, 96)
    monkeypatch.setattr(quantized, "_adds_integers", lambda: False)
    of, wide, _ = made("int8", torch.randn(64, 96))
    torch.testing.assert_close(of(rows), rows @ wide.T, rtol=1e-4, atol=1e-4)


# the quick profile has each quantization and each dtype once
@pytest.mark.parametrize(
    ("name", "dtype"), itertools.product(NAMES, DTYPES) if THOROUGH else zip(NAMES, DTYPES, strict=True)
)
@pytest.mark.parametrize(("family", "tied"), [("llama", True), *([("qwen2", False)] if THOROUGH else [])])
def test_every_plan_gives_the_bits_of_its_own_ar(name, dtype, family, tied):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "tie_word_embeddings": tied}
    model = wrap_model(make_causal_lm(family, dtype, **sizes))
    quantize_model(model, name)
    texts = [[1, 2, 3, 4, 5, 6] * 9, [7, 8, 9], [5, 3] * 30]
    report = check_bitwise(model, texts, 12, plans([4]))
    assert report.holds, report.as_dict()
    assert report.as_dict()["quantize"] == model.quantize == name


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_hardly_changes(name, folder):
    text = [([1, 2], [*range(3, 90)])]
    losses = {
        each: -score(load_model(folder, "cpu", "float32", quantize=each), text)[0].logprob for each in (None, name)
    }
    assert losses[name] == pytest.approx(losses[None], rel={"int8": 0.02, "int4": 0.3}[name])
    assert losses[name] != losses[None]


def test_no_weights_are_left(folder, monkeypatch):
    """Those of the embedding, which the output layer shares, are gone too: its rows are read from the folder."""
    monkeypatch.setattr("tidar_megatron.inference.embedding.WORTH", 0)
    causal_lm = load_model(folder, "cpu", "bfloat16", quantize="int8").causal_lm
    assert not [name for name, weight in causal_lm.named_parameters() if not weight.is_meta and weight.dim() == 2]


def test_an_output_layer_of_its_own_loses_its_weight():
    model = wrap_model(make_causal_lm("llama", torch.bfloat16))
    quantize_model(model, "int8")
    assert model.causal_lm.lm_head.weight.is_meta and not model.causal_lm.model.embed_tokens.weight.is_meta


@pytest.mark.parametrize("name", NAMES)
def test_the_cache_has_the_bytes_of_the_weights(name, folder):
    load_model(folder, "cpu", "bfloat16", quantize=name)
    file = folder / ".tidar" / f"{name}-bfloat16.safetensors"
    weights, head = 2 * (64 * (64 + 2 * 32) + 64 * 64 + 3 * 96 * 64), 258 * 64  # q, k, v, output, MLP; output layer
    outputs = 2 * (64 + 64 + 64 + 2 * 96 + 64)
    inputs = 2 * (64 + 64 + 64 + 96)
    tensors = weights + 4 * (outputs + inputs) if name == "int8" else weights // 2 + 4 * weights // quantized.GROUP
    tensors += head + 4 * (258 + 64)  # the output layer has 8 bits in both
    assert tensors < file.stat().st_size < tensors + 4096  # and a header
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def bits(model):
    with torch.inference_mode():
        return model.logits(torch.linspace(-1, 1, 64, dtype=model.dtype).repeat(3, 1))


@pytest.fixture
def quantizations(monkeypatch):
    """Counts the weights that are quantized."""
    counts = []
    real = quantized.to_int8
    monkeypatch.setattr(quantizing, "to_int8", lambda *given: (counts.append(given[0].shape), real(*given))[1])
    return counts


def load_int8(folder):
    return load_model(folder, "cpu", "bfloat16", quantize="int8")


def test_weights_are_quantized_once(folder, quantizations):
    first = bits(load_int8(folder))
    assert len(quantizations) == 2 * 4 + 1
    assert torch.equal(bits(load_int8(folder)), first)
    assert len(quantizations) == 9
    load_model(folder, "cpu", "float32", quantize="int8")  # has a cache of its own: its weights are not rounded
    assert len(quantizations) == 18


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "header"])
def test_a_damaged_cache_is_rebuilt(folder, quantizations, damage):
    first = bits(load_int8(folder))
    file = folder / ".tidar" / "int8-bfloat16.safetensors"
    content = file.read_bytes()
    broken = {
        "cut": content[: len(content) // 2],
        "flipped": content[:-5] + bytes([content[-5] ^ 64]) + content[-4:],
        "empty": b"",
        "header": b"\xff" * 20 + content[20:],
    }
    file.write_bytes(broken[damage])
    assert torch.equal(bits(load_int8(folder)), first)
    assert len(quantizations) == 18
    load_int8(folder)
    assert len(quantizations) == 18 and len(list(file.parent.iterdir())) == 1


def test_other_weights_are_quantized_anew(folder, quantizations):
    load_int8(folder)
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1000:] = content[-2000:-1000]
    weights.write_bytes(bytes(content))
    stat = weights.stat()
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    load_int8(folder)
    assert len(quantizations) == 18


def test_a_folder_that_cannot_be_written_is_cached_elsewhere(folder, quantizations, own_cache, monkeypatch):
    (folder / ".tidar").write_text("not a folder")
    first = bits(load_int8(folder))
    assert [path.name.startswith("int8-bfloat16-") for path in own_cache.iterdir()] == [True]
    assert torch.equal(bits(load_int8(folder)), first) and len(quantizations) == 9
    other = own_cache.parent / "file"
    other.write_text("")
    monkeypatch.setenv("TIDAR_CACHE", str(other / "none"))
    assert torch.equal(bits(load_int8(folder)), first) and len(quantizations) == 18


def test_the_planners_costs_are_of_the_quantization(folder):
    models = [load_model(folder, "cpu", "bfloat16", quantize=name) for name in (None, *NAMES)]
    assert len({costs._costs_file(model) for model in models}) == 3


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"quantize": "int3"}, "quantize 'int3': use int8 or int4"),
        ({"quantize": "int8", "dtype": "float64"}, "quantize int8: needs dtype float32 or bfloat16, not float64"),
        ({"quantize": "int8", "device": "meta"}, "quantize int8: runs on CPUs only, not on meta"),
        ({"quantize": "int8", "keep_weights": True}, "quantize int8: takes the weights of the modules"),
    ],
)
def test_refusals(folder, asked, message):
    with pytest.raises(UserError, match=message):
        load_model(folder, **{"device": "cpu", "dtype": "bfloat16", **asked})


def test_a_model_without_a_lean_forward_is_refused():
    model = wrap_model(make_causal_lm("gemma", torch.float32))
    with pytest.raises(UserError, match="quantize int8: GemmaForCausalLM runs as transformers' modules"):
        quantize_model(model, "int8")


def test_int4_refuses_widths_that_groups_do_not_divide():
    model = wrap_model(make_causal_lm("llama", torch.float32))
    with pytest.raises(UserError, match="quantize int4: a weight has 48 inputs, which 32 does not divide; use int8"):
        quantize_model(model, "int4")


@pytest.mark.slow
def test_the_programs(folder, tmp_path):
    generated = [
        call(*("tools/generate.py", "--model", folder, "--prompt", "hello", "--max-new-tokens", 8, "--json"), *more)
        for more in (("--quantize", "int8", "--plan", "ar"), ("--quantize", "int8", "--plan", "2:4"))
    ]
    texts = [json.loads(done.stdout)["text"] for done in generated]
    assert texts[0] == texts[1]
    (tmp_path / "prompts.jsonl").write_text('"hello"\n')
    certify = ("tools/certify.py", "--model", folder, "--prompts", tmp_path / "prompts.jsonl", "--quantize", "int8")
    done = call(*certify, "--max-new-tokens", 8, "--draft-lengths", 2, "--json")
    assert done.returncode == 0, done.stderr
    assert "transformers cannot run it; compared bit by bit with the engine's own AR" in done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["holds"] and found["quantize"] == "int8"
    done = call("tools/generate.py", "--model", folder, "--prompt", "hello", "--quantize", "int3")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and "use int8 or int4" in done.stderr


@pytest.mark.parametrize("name", NAMES)
def test_the_bits_that_benchmarks_count_are_those_of_the_cache(name, folder):
    """Benchmarks leave out int8's factors of inputs and scales of outputs, which are few."""
    sizes = Sizes.of(load_model(folder, "cpu", "bfloat16", quantize=name))
    layers, output = bits_of(name, 16)
    kept = [(key, tensor) for key, tensor in load_file(folder / ".tidar" / f"{name}-bfloat16.safetensors").items()]
    counted = sum(tensor.nbytes for key, tensor in kept if key.endswith("values") or tensor.dim() == 3)
    assert counted == sizes.weight_bytes == (layers * sizes.weights + output * sizes.output_weights) // 8
