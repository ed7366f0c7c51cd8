"""Section 7: training steps of a 1.5B model on this one device: tokens per second, MFU and peak memory."""

import gc
from typing import Any

import torch

from tidar_megatron.benchmark.training import step_config, training
from tidar_megatron.gpu_check.machine import bf16_flops
from tidar_megatron.gpu_check.setting import NOT_ON_A_CPU, Setting
from tidar_megatron.gpu_check.step import TINY
from tidar_megatron.planning.flops import model_flops
from tidar_megatron.planning.sizes import Sizes

MODEL = {
    "num_layers": 28,
    "hidden_size": 1536,
    "ffn_hidden_size": 8960,
    "num_attention_heads": 12,
    "num_query_groups": 2,
    "kv_channels": 128,
    "qk_layernorm": False,
    "add_qkv_bias": True,
    "vocab_size": 151936,
}


def check(setting: Setting) -> None:
    """Find the figures at the longest sequence of a few that fits in the memory."""
    ceiling = bf16_flops(setting)
    setting.found |= {"ceiling_flops": ceiling}
    setting.found |= {} if setting.on_gpu else {"note": f"{NOT_ON_A_CPU}: peak memory, flex's backward"}
    rows = setting.rows("rows")
    for length in setting.size((4096, 2048, 1024), (64,)):
        if rows or not setting.in_time():
            break
        try:
            rows.append(_measure(setting, length, ceiling))
        except torch.OutOfMemoryError:
            setting.summary.append(f"S = {length}: out of memory")
            gc.collect()
            torch.cuda.empty_cache()
    setting.require(bool(rows) or setting.stopped_early, "no sequence length fits in the memory")
    for row in rows:
        peak = row["peak_gib"]
        setting.summary.append(
            f"S = {row['seq_length']}: {row['clean_tokens_per_second']:,.0f} clean tokens/s, MFU {row['mfu']:.1%} of "
            f"the measured ceiling (AR {row['ar_mfu']:.1%}), peak {f'{peak:.1f} GiB' if peak else NOT_ON_A_CPU}"
        )


def _measure(setting: Setting, length: int, ceiling: float) -> dict[str, Any]:
    model = setting.size(MODEL, TINY)
    if setting.on_gpu:
        torch.cuda.reset_peak_memory_stats(setting.device)
    (row,) = training([length], [1.0], setting.size(5, 1), model=model, tokens=length)["rows"]
    peak = torch.cuda.max_memory_allocated(setting.device) / 2**30 if setting.on_gpu else None
    trained, plain = model_flops(Sizes.of(step_config(length, model=model, tokens=length), 1))
    seconds, ar_seconds = (row[name]["median"] for name in ("tidar_seconds", "ar_seconds"))
    return row | {
        "clean_tokens_per_second": length / seconds,
        "mfu": trained / seconds / ceiling,
        "ar_mfu": plain / ar_seconds / ceiling,
        "tidar_tflops": trained / seconds / 1e12,
        "peak_gib": peak,
    }
