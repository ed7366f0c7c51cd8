"""The name-mapping table both ways: import then export changes no bit; what we would compute otherwise is refused."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file

from tests.training.test_parity import FAMILIES, write_random_model
from tidar_megatron.checkpoint.huggingface import (
    export_huggingface,
    load_huggingface_weights,
    model_from_huggingface,
)
from tidar_megatron.checkpoint.mapping import TABLE, cut
from tidar_megatron.config import Config, ModelConfig, TiDARConfig, build_config
from tidar_megatron.distributed.groups import initialize, shut_down
from tidar_megatron.errors import UserError
from tidar_megatron.models.gpt import build_model


@pytest.mark.parametrize("family", list(FAMILIES))
def test_import_then_export_is_bitwise(family, tmp_path):
    source = write_random_model(tmp_path / "source", **FAMILIES[family])
    model_config = model_from_huggingface(source, ModelConfig(make_vocab_size_divisible_by=128))
    config = dataclasses.replace(Config(), model=model_config, tidar=TiDARConfig(mask_token_id=259))
    (model,) = build_model(config, 260, initialize(config.parallel, 0))
    load_huggingface_weights([model], source, 260)
    export_huggingface(model, config, None, tmp_path / "target")
    shut_down()
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "target" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name
    ours, theirs = (json.loads((tmp_path / n / "config.json").read_text()) for n in ("target", "source"))
    for key in ("model_type", "hidden_size", "vocab_size", "rms_norm_eps", "rope_parameters", "tie_word_embeddings"):
        assert ours[key] == theirs[key], key


def test_a_vocabulary_without_a_free_row_grows_by_the_mean(tmp_path):
    source = write_random_model(tmp_path / "source", qk_layernorm=True, tie=True)
    config = dataclasses.replace(
        Config(), model=model_from_huggingface(source, ModelConfig(make_vocab_size_divisible_by=8))
    )
    (model,) = build_model(config, 261, initialize(config.parallel, 0))
    load_huggingface_weights([model], source, 261)
    embedding = model.embedding.word_embeddings.weight
    shut_down()
    assert embedding.shape[0] == 264
    torch.testing.assert_close(embedding[260], embedding[:260].mean(0))
    assert not embedding[261:].any()


def test_tensor_parallel_parts_make_the_whole():
    whole = torch.arange(8 * 6.0).reshape(8, 6)
    for entry in TABLE:
        parts = [cut(entry, whole, rank, 2) for rank in (0, 1)]
        if entry.shard == "replicated":
            assert all(torch.equal(part, whole) for part in parts)
        else:
            assert sum(part.numel() for part in parts) == whole.numel()
            assert set(torch.cat([part.flatten() for part in parts]).tolist()) == set(whole.flatten().tolist())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope type 'yarn'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"use_sliding_window": True}, "sliding windows"),
    ],
)
def test_what_we_would_compute_otherwise_is_refused_by_name(tmp_path, change, said):
    write_random_model(tmp_path, qk_layernorm=True, tie=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=said):
        model_from_huggingface(tmp_path, ModelConfig())


def test_folders_that_are_not_whole(tmp_path):
    with pytest.raises(UserError, match="not found; give a Hugging Face model folder"):
        model_from_huggingface(tmp_path, ModelConfig())
    write_random_model(tmp_path, qk_layernorm=True, tie=True)
    (tmp_path / "model.safetensors").unlink()
    config = build_config({})
    config = dataclasses.replace(config, model=model_from_huggingface(tmp_path, config.model))
    (model,) = build_model(config, 260, initialize(config.parallel, 0))
    with pytest.raises(UserError, match=r"holds no \*\.safetensors"):
        load_huggingface_weights([model], tmp_path, 260)
    shut_down()
