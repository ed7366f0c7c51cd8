"""The recipes say what they claim: they load, their sizes are the published ones, their batches and lengths add up."""

import pytest

from tests.conftest import ROOT
from tidar_megatron.config import load_config

RECIPES = sorted((ROOT / "examples" / "recipes").glob("*.yaml"))
TOKENS_PER_STEP = 2**21
PUBLISHED = {  # parameters, as the models' own checkpoints count them
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen3-8b": 8_190_735_360,
    "qwen3-moe-30b-a3b": 30_532_122_624,
}


def parameters(m):
    """Counted from the sizes alone."""
    channels = m.kv_channels or m.hidden_size // m.num_attention_heads
    queries, keys = m.num_attention_heads * channels, m.num_query_groups * channels
    attention = m.hidden_size * (2 * queries + 2 * keys) + m.add_qkv_bias * (queries + 2 * keys)
    attention += m.qk_layernorm * 2 * channels
    if experts := m.num_experts:
        mlp = experts * 3 * m.hidden_size * m.moe_ffn_hidden_size + experts * m.hidden_size
    else:
        mlp = 3 * m.hidden_size * m.ffn_hidden_size
    embeddings = (1 + m.untie_embeddings_and_output_weights) * m.vocab_size * m.hidden_size
    return m.num_layers * (attention + mlp + 2 * m.hidden_size) + embeddings + m.hidden_size


def test_there_are_the_papers_runs():
    names = {path.stem for path in RECIPES}
    assert names >= {"qwen2.5-1.5b-b4", "qwen2.5-1.5b-b8", "qwen2.5-1.5b-b16", "qwen3-8b-b16"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe(path):
    config = load_config(path)
    model, training, parallel = config.model, config.training, config.parallel
    (published,) = [count for name, count in PUBLISHED.items() if path.stem.startswith(name)]
    assert parameters(model) == published
    assert training.global_batch_size * config.data.seq_length == TOKENS_PER_STEP
    tokens = 50e9 if "1.5b" in path.stem else 150e9
    assert 0 <= training.train_iters * TOKENS_PER_STEP - tokens < TOKENS_PER_STEP
    assert config.data.seq_length % (2 * parallel.context_parallel_size * config.tidar.block_size) == 0
    assert (config.optimizer.lr, config.optimizer.min_lr) == (1e-5, 3e-6)
    assert config.checkpoint.load == config.checkpoint.save == f"runs/{path.stem}"
    assert str(path.relative_to(ROOT)) in path.read_text()  # its own launch lines
