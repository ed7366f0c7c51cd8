"""A model is trained only if it can be exported, over every combination of the settings that decide its class."""

import dataclasses
import gc
import itertools

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.training.small_runs import small
from tidar_megatron.config import build_config
from tidar_megatron.data.doubled import make_batch
from tidar_megatron.data.manifest import TokenizerEntry
from tidar_megatron.data.packing import Piece, pack
from tidar_megatron.distributed.fake import play_rank
from tidar_megatron.errors import UserError
from tidar_megatron.huggingface.families import huggingface_config
from tidar_megatron.huggingface.folders import export_huggingface
from tidar_megatron.huggingface.streaming import unsharded_model
from tidar_megatron.models.gpt import build_model, run_model
from tidar_megatron.models.initialize import initialize_weights
from tidar_megatron.models.output_layer import output_weight
from tidar_megatron.planning.hardware import HARDWARE
from tidar_megatron.planning.report import report_layouts
from tidar_megatron.training.resolve import resolve
from tidar_megatron.training.trainer import Trainer

TOKENIZER = TokenizerEntry(spec="byte", fingerprint="0" * 64, vocab_size=96, eos_token_id=95)
MASK = 96
WIDTHS = {  # hidden size, channels of a head
    "plain": (32, None),
    "wide heads": (32, 16),
    "heads that do not divide": (36, 16),  # of 8 heads
}
LLAMA3 = {"rope_scaling_type": "llama3", "rope_original_max_position_embeddings": 16}
GRID = list(itertools.product(*[[False, True]] * 4, WIDTHS))


@pytest.fixture(scope="module", autouse=True)
def _quick_collections():
    """Building a model collects garbage, which takes long where transformers is imported."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def configuration(qk_layernorm, bias, experts, untied, width):
    hidden_size, kv_channels = WIDTHS[width]
    return build_config(
        {
            "tidar": {"block_size": 4},
            "model": {
                "num_layers": 2,
                "hidden_size": hidden_size,
                "ffn_hidden_size": 48,
                "num_attention_heads": 8,
                "num_query_groups": 4,
                "kv_channels": kv_channels,
                "qk_layernorm": qk_layernorm,
                "add_qkv_bias": bias,
                "untie_embeddings_and_output_weights": untied,
                "init_method_std": 0.2,
                **({"num_experts": 4, "moe_ffn_hidden_size": 16} if experts else {}),
                **(LLAMA3 if untied else {}),  # so each class is seen with both kinds of positions
            },
            "data": {"seq_length": 32},
        }
    )


@torch.no_grad()
def largest_difference(config, folder):
    """Between the logits of a model with random weights, and those of transformers from its exported folder."""
    whole, tokens = unsharded_model(config), torch.randint(MASK, (32,))
    batch = make_batch([pack([Piece(0, 0, 32)], [tokens.numpy()], 0)], 4, MASK, doubled=False)
    with play_rank(config.parallel, 0, 1, "cpu") as ranks:
        (model,) = build_model(config, config.model.vocab_size, ranks)
        initialize_weights([model], 0)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0.0, 0.2)
        ours = (run_model(model, batch) @ output_weight(model).t())[:, 0, : config.model.vocab_size]
    export_huggingface(whole, dict(model.named_parameters()).__getitem__, config, None, folder)
    theirs, found = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert not any(found.values()), found
    ours, theirs = ours[:, :MASK], theirs(tokens[None]).logits[0, :, :MASK]  # an export decides the mask token's row
    return (ours - theirs).abs().max().item()


@pytest.mark.slow
def test_what_is_trained_can_be_exported_and_nothing_else_is_refused(tmp_path):
    """Accepted: its export loads, and computes the same. Refused: in one line, by all that would have to do with it."""
    exported, refused = set(), set()
    for number, case in enumerate(GRID):
        config = configuration(*case)
        try:
            config = resolve(config, TOKENIZER)
        except UserError:
            refused.add(case)
            with pytest.raises(UserError, match=r"^[^\n]*cannot be exported[^\n]*$"):  # as an export says
                huggingface_config(config, None)
            with pytest.raises(UserError, match="cannot be exported"):  # and a plan
                report_layouts(with_vocabulary(config), 1, HARDWARE["h100"], None, 1)
        else:
            assert largest_difference(config, tmp_path / str(number)) < 1e-4
            exported.add(case)
    classes = {case[:3] for case in exported}  # QK norm, bias, experts: Llama, Qwen2, Qwen3, Qwen3-MoE
    assert classes == {(False, False, False), (False, True, False), (True, False, False), (True, False, True)}
    assert not {case[:3] for case in refused} & classes


def with_vocabulary(config):
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=97))


@pytest.mark.parametrize(
    ("model", "line"),
    [
        (
            {"add_qkv_bias": True},
            "no Hugging Face class has --qk-layernorm with --add-qkv-bias, so the model cannot be exported; leave "
            "--add-qkv-bias out (Qwen3), or add --no-qk-layernorm (Qwen2)",
        ),
        (
            {"num_experts": 4, "qk_layernorm": False},
            "no Hugging Face class has --num-experts with --no-qk-layernorm, so the model cannot be exported; add "
            "--qk-layernorm (Qwen3-MoE)",
        ),
    ],
)
def test_a_run_is_refused_before_it_starts(shards, model, line):
    with pytest.raises(UserError) as refused:
        Trainer.build(small(shards, model=model))
    assert str(refused.value) == line


def test_what_a_class_itself_refuses_is_refused(monkeypatch):
    """Whatever transformers checks in a release to come: a run asks the class that its export would name."""
    from transformers import Qwen3Config

    def refuse(settings, **others):
        raise ValueError("no\nsuch thing")

    monkeypatch.setattr(Qwen3Config, "from_dict", refuse)
    with pytest.raises(UserError, match=r"Qwen3ForCausalLM rejects this model.* exported: no such thing; change"):
        resolve(configuration(True, False, False, False, "plain"), TOKENIZER)
