"""The models that the planner's tests are about, tiny and real."""

from tidar_megatron.config import build_config
from tidar_megatron.planning.sizes import Sizes

MODEL = {
    "num_layers": 4,
    "hidden_size": 64,
    "ffn_hidden_size": 160,
    "num_attention_heads": 8,
    "num_query_groups": 4,
    "vocab_size": 250,  # padded to 256
    "untie_embeddings_and_output_weights": True,
}
QWEN3_8B = {
    "num_layers": 36,
    "hidden_size": 4096,
    "ffn_hidden_size": 12288,
    "num_attention_heads": 32,
    "num_query_groups": 8,
    "kv_channels": 128,
    "untie_embeddings_and_output_weights": True,
    "vocab_size": 151936,
}
QWEN3_30B_A3B = {
    **QWEN3_8B,
    "hidden_size": 2048,
    "num_query_groups": 4,
    "num_experts": 128,
    "moe_router_topk": 8,
    "moe_ffn_hidden_size": 768,
}
TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}
CP2 = {"context_parallel_size": 2}
MOE = {"num_experts": 4, "moe_ffn_hidden_size": 48, "moe_aux_loss_coeff": 0.01}
SELECTIVE = {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp"]}


DRAFTS = {"train": "drafts", "draft_rank": 4, "draft_selector": 3, "draft_loss": "ce"}


def sizes_of(world_size, model=None, training=None, fraction=1.0, anywhere=0, drafts=None, **parallel):
    """Return the sizes of a tiny model; ``anywhere`` is the number of blocks that start anywhere."""
    starts = {"block_starts": "anywhere", "blocks_per_sequence": anywhere} if anywhere else {}
    tree = {
        "tidar": {
            "block_size": 8,
            "attention_backend": "chunked",
            "attention_chunk_size": 32,
            "diffusion_block_fraction": fraction,
            **starts,
        },
        "drafts": drafts or {},
        "model": {**MODEL, **(model or {})},
        "data": {"seq_length": 128},
        "training": {"global_batch_size": 8, **(training or {})},
        "parallel": parallel,
    }
    return Sizes.of(build_config(tree), world_size)
