"""The memory that a call takes on the GPU."""

from collections.abc import Callable

import torch

from tidar_megatron.gpu_check.setting import Setting


def peak_extra_bytes(run: Callable[[], object], setting: Setting) -> int | None:
    """Return the peak of memory during ``run`` beyond what was allocated before; None on a CPU."""
    if not setting.on_gpu:
        return None
    torch.cuda.synchronize(setting.device)
    torch.cuda.reset_peak_memory_stats(setting.device)
    before = torch.cuda.memory_allocated(setting.device)
    run()
    torch.cuda.synchronize(setting.device)
    return torch.cuda.max_memory_allocated(setting.device) - before
