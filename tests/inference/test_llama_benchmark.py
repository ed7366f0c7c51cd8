"""llama.cpp's rows of ``tools/benchmark.py decode``: the GGUF file has the same weights, and what is counted."""

import importlib.util
import sys
import types
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.inference.conftest import make_causal_lm
from tidar_megatron.benchmark import llama
from tidar_megatron.benchmark.energy import Sizes
from tidar_megatron.benchmark.gguf_file import why_not, write_gguf
from tidar_megatron.benchmark.llama import LlamaCpp, missing
from tidar_megatron.benchmark.ways import ours
from tidar_megatron.inference.request import parse_plan
from tidar_megatron.inference.wrapping import wrap_model

TEXT = [1, 2, 3, 4, 5, 6, 7, 1, 2, 3]
SIZES = {"hidden_size": 64, "intermediate_size": 96}  # multiples of 32, as llama.cpp's quantized types need


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("family", "tied"), [("llama", True), ("qwen2", False), ("qwen3", False)])
def test_the_file_has_the_same_weights(family, tied, dtype, tmp_path):
    gguf = pytest.importorskip("gguf")
    lm = make_causal_lm(family, dtype, tidar=False, tie_word_embeddings=tied, **SIZES)
    assert why_not(lm) is None
    write_gguf(lm, tmp_path / "model.gguf")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    found = {tensor.name: tensor for tensor in reader.tensors}
    assert ("output.weight" in found) is not tied
    assert reader.fields[f"{family}.attention.head_count_kv"].contents() == lm.config.num_key_value_heads
    weights = lm.state_dict()
    assert len(found) == len(weights) - tied

    def read(name):
        tensor = found[name]
        wanted = "F32" if len(tensor.shape) == 1 or dtype == torch.float32 else "BF16"
        assert tensor.tensor_type.name == wanted
        return torch.from_numpy(np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type)))

    assert torch.equal(read("blk.1.ffn_down.weight"), weights["model.layers.1.mlp.down_proj.weight"].float())
    assert torch.equal(read("output_norm.weight"), weights["model.norm.weight"].float())
    query = weights["model.layers.0.self_attn.q_proj.weight"].float()
    if family == "llama":  # its rotary pairs are side by side
        half = query.shape[0] // lm.config.num_attention_heads // 2
        assert torch.equal(read("blk.0.attn_q.weight")[:4], query[[0, half, 1, half + 1]])
    else:
        assert torch.equal(read("blk.0.attn_q.weight"), query)


@pytest.mark.parametrize(
    ("family", "dtype", "changes", "reason"),
    [
        ("gemma", torch.float32, {}, "GemmaForCausalLM is not converted to GGUF, only Llama"),
        ("llama", torch.float64, {}, "it has no float64"),
        ("llama", torch.float32, {"attention_bias": True}, "biases (k_proj, o_proj, q_proj, v_proj) are not"),
        ("mistral", torch.float32, {"sliding_window": 8}, "a sliding window is not"),
        ("llama", torch.float32, {"hidden_act": "gelu"}, "its LlamaForCausalLM has the activation silu, not gelu"),
        (
            "llama",
            torch.float32,
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
            "scaled or partial rotary positions",
        ),
    ],
)
def test_what_is_not_converted_has_a_reason(family, dtype, changes, reason, monkeypatch):
    monkeypatch.setattr(llama, "find_spec", lambda name: True)
    assert missing(make_causal_lm(family, dtype, tidar=False, **changes)).startswith(f"llama.cpp: {reason}")


def test_without_llama_cpp_a_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(llama, "find_spec", lambda name: None)
    assert "pip install -e '.[llama]'" in missing(make_causal_lm("llama", torch.float32, tidar=False))


class StandIn:
    """Has of ``llama_cpp.Llama`` what is used: it counts up, and drafts two tokens of which one is accepted."""

    def __init__(self, path, *, n_ctx, type_k, type_v, logits_all, draft_model, verbose, **threads_and_batch):
        assert (
            type_k == type_v == ("F16" if "Q8_0" in path else "F32")
            and n_ctx % 256 == 0
            and logits_all is (draft_model is not None)
            and not verbose
        )
        self.draft_model, self.n_tokens = draft_model, 7

    def reset(self):
        self.n_tokens = 0

    def eval(self, tokens):
        self.n_tokens += len(tokens)

    def generate(self, tokens, top_k, temp, repeat_penalty):
        assert (top_k, temp, repeat_penalty) == (1, 0.0, 1.0)
        token = tokens[-1]
        while True:
            self.eval(tokens)
            for _ in range(1 if self.draft_model is None else 2):
                token += 1
                yield token
            tokens = [token] if self.draft_model is None else [token, 0, 0]


def quantize(source, target, how):
    if how._obj.ftype == "Q4":
        return 1
    with open(target.decode(), "wb") as file:
        file.write(bytes(1000))
    return 0


def test_what_is_counted(monkeypatch):
    """The library is a stand-in, whose Q4_1 fails."""
    library, speculative = types.ModuleType("llama_cpp"), types.ModuleType("llama_cpp.llama_speculative")
    library.Llama, library.llama_model_quantize = StandIn, quantize
    library.LLAMA_FTYPE_MOSTLY_Q8_0, library.LLAMA_FTYPE_MOSTLY_Q4_1 = "Q8", "Q4"
    library.GGML_TYPE_F32, library.GGML_TYPE_F16 = "F32", "F16"
    library.llama_model_quantize_default_params = types.SimpleNamespace
    library.llama_log_callback, library.llama_log_set = (lambda log: log), (lambda log, data: None)
    speculative.LlamaPromptLookupDecoding = lambda num_pred_tokens: num_pred_tokens
    monkeypatch.setitem(sys.modules, "llama_cpp", library)
    monkeypatch.setitem(sys.modules, "llama_cpp.llama_speculative", speculative)
    monkeypatch.setattr(llama.ctypes, "byref", lambda how: types.SimpleNamespace(_obj=how))
    monkeypatch.setattr(llama, "write_gguf", lambda lm, path: path.write_bytes(bytes(4000)))
    llama._only_errors.cache_clear()
    sizes = Sizes(weights=800, output_weights=100, weight_bytes=3600, kv_bytes=40, flops_per_pair=4)
    with LlamaCpp(make_causal_lm("llama", torch.float32, tidar=False), sizes) as found:  # not tied: 1,000 weights
        assert found.bits_per_weight == {"float32": 32.0, "Q8_0": 8.0}
        assert found.failed == ["llama.cpp Q4_1: llama.cpp cannot quantize this model"]
        ways = found.ways(20, 4, 8)
        files = [*found._files.values()]
    llama._only_errors.cache_clear()
    assert not any(file.exists() for file in files)
    assert [*ways] == [f"llama.cpp {name}" for name in ("float32", "float32 lookup", "Q8_0", "Q8_0 lookup")]
    for _ in range(2):  # nothing is left of the request before
        plain, lookup = ways["llama.cpp Q8_0"]([TEXT]), ways["llama.cpp Q8_0 lookup"]([TEXT])
        assert plain.tokens == lookup.tokens == [[4, 5, 6, 7]]
        assert (plain.forwards, lookup.forwards) == (4, 2) and plain.first_token_seconds > 0
        assert plain.work.bytes_read == 4 * 900 + 20 * (10 + 11 + 12 + 13)  # of the file's 1,000 bytes; K/V of float16
        assert plain.work.flops == 2 * 800 * 13 + 2 * 100 * 4 + 4 * (10 * 10 + 11 + 12 + 13)
        assert lookup.work.bytes_read == 2 * 900 + 20 * (10 + 13)


@pytest.mark.skipif(
    not (importlib.util.find_spec("llama_cpp") and importlib.util.find_spec("gguf")), reason="needs the extra llama"
)
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_llama_cpp_says_the_same(family):
    lm = make_causal_lm(family, torch.float32, tidar=False, **SIZES)
    model = wrap_model(lm)
    ar = ours(model, replace(parse_plan("ar"), max_new_tokens=40), [TEXT])
    with LlamaCpp(lm, Sizes.of(model)) as found:
        ways = found.ways(len(TEXT) + 40, 40, 8)
        assert len(ways) == 6 and not found.failed
        for name, way in ways.items():
            for run in (way([TEXT]), way([TEXT])):
                assert len(run.tokens[0]) == 40
                assert not name.startswith("llama.cpp float32") or run.tokens == ar.tokens
        assert way([TEXT]).forwards <= 40
        bits = found.bits_per_weight
        assert bits["float32"] > 32 and 8 < bits["Q8_0"] < 12 and 5 < bits["Q4_1"] < 8
