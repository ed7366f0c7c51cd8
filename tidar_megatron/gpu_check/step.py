"""Section 6: a TiDAR training step against AR's, at the shapes of an 8B model's layers."""

from tidar_megatron.benchmark.training import training
from tidar_megatron.gpu_check.setting import NOT_ON_A_CPU, Setting

LAYERS_OF_ALL = 36
LAYERS = 4
# the vocabulary is smaller in proportion to the layers, so that the output layer has the share that it has in the model
MODEL = {
    "num_layers": LAYERS,
    "hidden_size": 4096,
    "ffn_hidden_size": 12288,
    "num_attention_heads": 32,
    "num_query_groups": 8,
    "kv_channels": 128,
    "vocab_size": 151936 * LAYERS // LAYERS_OF_ALL // 128 * 128,
    "untie_embeddings_and_output_weights": True,
}
TINY = {
    "num_layers": 1,
    "hidden_size": 32,
    "ffn_hidden_size": 64,
    "num_attention_heads": 2,
    "num_query_groups": 1,
    "kv_channels": 16,
    "vocab_size": 256,
}


def check(setting: Setting) -> None:
    """Find the ratio for each sequence length and fraction of the blocks with masks."""
    setting.found |= {} if setting.on_gpu else {"note": f"{NOT_ON_A_CPU}: flex's backward; chunked attention instead"}
    rows = setting.rows("rows")
    for length in setting.size((4096, 16384), (64,)):
        if not setting.in_time():
            break
        with setting.guard(f"S = {length}"):
            result = training([length], [1.0, 0.25], setting.size(3, 1), model=setting.size(MODEL, TINY), tokens=length)
            setting.found["settings"] = result["settings"]
            rows += result["rows"]
    for row in rows:
        setting.summary.append(
            f"S = {row['seq_length']}, {row['diffusion_block_fraction']:.0%} of the blocks: "
            f"{1e3 * row['tidar_seconds']['median']:.1f} ms, {row['tidar_over_ar']:.2f} of AR's step"
        )
