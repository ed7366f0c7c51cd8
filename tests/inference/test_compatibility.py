"""What a class of transformers does decides whether it is decoded, not what the keys of its configuration say."""

from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version

from tidar_megatron.errors import UserError
from tidar_megatron.inference import compatibility
from tidar_megatron.inference.attention import UnknownAttentionError, packed_attention
from tidar_megatron.inference.cache import KVPool
from tidar_megatron.inference.engine import generate_batch
from tidar_megatron.inference.forward import ForwardLayout, PackedForward, Part
from tidar_megatron.inference.loading import load_model
from tidar_megatron.inference.request import DecodeOptions
from tidar_megatron.inference.wrapping import wrap_model

MASK = 47
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0] * 4,
    "original_max_position_embeddings": 64,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
SOME_SLIDE = {"layer_types": ["full_attention", "sliding_attention"], "use_sliding_window": True}
EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 4}


def build(family: str, tidar: bool = True, std: float = 0.2, **changes: Any) -> Any:
    values = {"vocab_size": 48, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    values |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    values |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "initializer_range": std}
    config = getattr(transformers, f"{family}Config")(**(values | changes))
    if tidar:
        config.tidar = {"mask_token_id": MASK, "block_size": 4}
    torch.manual_seed(0)
    return getattr(transformers, f"{family}ForCausalLM")(config).eval()


# Windows that bite where they are (16), and windows that a comparison of a few tokens never reaches (100).
@pytest.mark.parametrize("window", [16, 100])
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("Mistral", {}),
        ("Mistral", {"use_sliding_window": False}),  # the class has no such switch
        ("Mixtral", {"use_sliding_window": False, **EXPERTS}),
        ("Phi3", {"use_sliding_window": False}),
        ("Starcoder2", {"use_sliding_window": False}),
        ("Qwen2", {"use_sliding_window": True, "max_window_layers": 1}),
        ("Qwen3", SOME_SLIDE),
        ("Cohere2", {}),
    ],
)
def test_a_window_that_the_class_applies_is_refused(family, changes, window):
    with pytest.raises(UserError, match=f"{family}ForCausalLM computes more .*sliding_window"):
        wrap_model(build(family, sliding_window=window, **changes))


def test_a_window_is_refused_beside_its_own_weights_in_a_folder(tmp_path):
    build("Mistral", sliding_window=100, use_sliding_window=False).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="sliding_window=100") as error:
        load_model(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("Doge", {"keep_window_size": 100}, "a mask of its own"),
        ("GptOss", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}, "s_aux|sliding_window"),
        ("DiffLlama", {}, "the logits differ"),
        ("Gemma2", {"head_dim": 8, "layer_types": ["full_attention"] * 2}, "softcap"),
        ("Granite", {"logits_scaling": 8.0}, "output layer makes.*logits_scaling=8.0"),
        ("Cohere", {"logit_scale": 0.5}, "output layer makes.*logit_scale=0.5"),
        ("Electra", {"is_decoder": True, "embedding_size": 16}, "output layer makes"),
        ("Bart", {"d_model": 32, "decoder_layers": 1, "encoder_layers": 1}, "output layer makes"),
        ("Llama", {"rope_parameters": LONGROPE}, "logits differ.*rope type 'longrope'"),
        ("Llama", {"sliding_window": 8}, "the logits differ"),  # the class has no window, but its cache obeys the key
        ("StableLm", {}, "without packed_forward"),
        ("Nemotron", {}, "without packed_forward"),
    ],
)
# small weights, as transformers initialises them, hardly attend
@pytest.mark.parametrize(("tidar", "std"), [(True, 0.02), (False, 0.2)])
def test_what_the_engine_does_not_compute_is_refused(family, changes, message, tidar, std):
    with pytest.raises(UserError, match=message):
        wrap_model(build(family, tidar, std, **changes))


def test_rope_settings_of_one_kind_of_layer_are_seen(tmp_path):
    """The top level of Gemma-3's ``rope_parameters`` holds no rope type."""
    rope = {"full_attention": LONGROPE, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    config = transformers.Gemma3TextConfig(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        head_dim=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        layer_types=["full_attention"] * 2,
        rope_parameters=rope,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    torch.manual_seed(0)
    reason = r"logits differ.*rope type 'longrope'"
    if Version(transformers.__version__) < Version("5.21"):
        reason = "transformers itself cannot run this model.*long_inv_freq"
    for tidar in (None, {"mask_token_id": MASK, "block_size": 4}):
        config.tidar = tidar
        with pytest.raises(UserError, match=reason):
            wrap_model(transformers.Gemma3ForCausalLM(config))


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("Mistral", {"sliding_window": 128}),  # the context never fills it
        ("Qwen2", {"sliding_window": 8, "use_sliding_window": False}),
        ("Qwen2", {"sliding_window": 100, "use_sliding_window": True, "max_window_layers": 2}),  # no layer slides
        ("Llama", {"final_logit_softcapping": 30.0, "logit_scale": 0.5}),  # keys of other classes
        ("Llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}),  # beyond 128 alone
        ("Llama", {"rope_parameters": LONGROPE | {"original_max_position_embeddings": 128}}),
    ],
)
def test_settings_that_change_nothing_are_welcome_and_decoded_exactly(family, changes):
    causal_lm = build(family, **changes).double()
    draw = torch.Generator().manual_seed(1)
    prompts = [torch.randint(MASK, (length,), generator=draw).tolist() for length in (3, 110)]
    wanted = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        options = {"max_new_tokens": 12, "do_sample": False, "suppress_tokens": [MASK], "pad_token_id": 0}
        found = causal_lm.generate(ids, attention_mask=torch.ones_like(ids), **options)
        wanted.append(found[0, len(prompt) :].tolist())
    model = wrap_model(causal_lm)
    for mode in ("ar", "tidar"):
        found = generate_batch(model, prompts, DecodeOptions(mode, max_new_tokens=12), batch_size=2)
        assert [one.token_ids for one in found] == wanted


def test_a_twin_has_the_weights_of_its_model_and_shorter_lengths():
    causal_lm = build("Mistral", sliding_window=100)
    lengths = compatibility._lengths(causal_lm, 128)
    assert lengths == [("sliding_window",)]
    twin = compatibility._twin(causal_lm, lengths)
    assert (twin.config.sliding_window, causal_lm.config.sliding_window) == (16, 100)
    own = dict(causal_lm.named_parameters())
    assert {name: weight.data_ptr() for name, weight in twin.named_parameters()} == {
        name: weight.data_ptr() for name, weight in own.items()
    }


def test_packed_attention_refuses_what_it_does_not_know():
    query, key = torch.zeros(1, 4, 1, 8), torch.zeros(1, 2, 1, 8)
    module = torch.nn.Module()
    module.layer_idx = 0

    def attend(mask=None, **arguments):
        packed = PackedForward(KVPool(1, 4), [Part(0, 0, [1], ForwardLayout(1))])
        return packed_attention(module, query, key, key, mask, packed_forward=packed, **arguments)

    attend(dropout=0.0, position_ids=None, sliding_window=None)
    for arguments in ({"sliding_window": 16}, {"softcap": 50.0}, {"s_aux": torch.zeros(4)}, {"is_causal": False}):
        with pytest.raises(UnknownAttentionError, match=next(iter(arguments))):
            attend(**arguments)
    with pytest.raises(UnknownAttentionError, match="mask of its own"):
        attend(mask=torch.zeros(1, 1, 1, 1))


def test_a_model_without_a_context_limit_is_refused():
    config = transformers.BloomConfig(vocab_size=48, hidden_size=32, n_layer=2, n_head=4)
    with pytest.raises(UserError, match=r"no max_position_embeddings|fixes its own attention"):
        wrap_model(transformers.BloomForCausalLM(config))


def test_a_model_that_transformers_cannot_run_is_blamed_on_its_configuration():
    causal_lm = build("Qwen3", **SOME_SLIDE, sliding_window=16)
    causal_lm.config.sliding_window = None
    with pytest.raises(UserError, match="transformers itself cannot run this model"):
        wrap_model(causal_lm)


HALF = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", HALF)
def test_what_rounding_would_hide_is_refused_in_half_precision(dtype):
    """Small weights attend nearly evenly, so rotary frequencies change less than bfloat16's rounding does."""
    with pytest.raises(UserError, match="logits differ"):
        wrap_model(build("Llama", std=0.02, rope_parameters=LONGROPE).to(dtype))


def test_experts_that_rounding_chooses_are_no_reason_to_refuse():
    model = build("Olmoe", std=0.2, num_experts=16, num_experts_per_tok=2, num_key_value_heads=4).bfloat16()
    weights = dict(model.named_parameters())
    wrap_model(model)
    assert all(weight is weights[name] for name, weight in model.named_parameters())
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("rope", [{}, {"rope_parameters": LLAMA3}])  # without and with a twin
@pytest.mark.parametrize("where", ["forward", "hook"])
def test_a_model_that_was_changed_in_memory_is_compared_itself(rope, where):
    model = build("Llama", **rope)

    def reversed_(name, output):
        setattr(output, name, getattr(output, name).flip(-1))
        return output

    if where == "hook":
        model.model.register_forward_hook(lambda module, inputs, output: reversed_("last_hidden_state", output))
    else:
        own = model.forward
        model.forward = lambda *args, **kwargs: reversed_("logits", own(*args, **kwargs))
    with pytest.raises(UserError, match="logits"):
        wrap_model(model)


def test_a_model_with_weights_elsewhere_is_refused():
    model = build("Llama")
    model.model.layers[1].to("meta")  # as accelerate leaves what it offloads
    with pytest.raises(UserError, match="not in memory"):
        wrap_model(model)


def test_a_model_of_two_dtypes_that_transformers_cannot_run_is_refused():
    model = build("Llama").bfloat16()
    model.lm_head.float()
    with pytest.raises(UserError, match=r"transformers itself cannot run this model .*dtype"):
        wrap_model(model)


def test_autocast_is_refused_by_name():
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(UserError, match="autocast is not supported"):
        wrap_model(build("Llama"))


@pytest.mark.parametrize("length", [2, 3])
def test_a_context_of_few_tokens_is_compared(length):
    wrap_model(build("Llama", tidar=False, max_position_embeddings=length))
