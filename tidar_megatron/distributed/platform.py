"""Differences between CPU and GPU hosts. Only this module handles a missing GPU.

megatron-core assumes CUDA in a handful of calls. Without CUDA, :func:`make_cpu_first_class` replaces them with CPU
equivalents, so the same training code runs under gloo on a laptop and under NCCL on a cluster. With a GPU it is a
no-op. It changes process-wide state: call it once, before building any megatron-core object.
"""

import contextlib
import ctypes
import resource
import time
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from tidar_megatron.config import Config
from tidar_megatron.errors import UserError

# megatron-core's optimizer distinguishes dtypes by the CUDA type name that Tensor.type() returns on a GPU
_CUDA_TYPE_NAMES = {
    torch.float32: "torch.cuda.FloatTensor",
    torch.float16: "torch.cuda.HalfTensor",
    torch.bfloat16: "torch.cuda.BFloat16Tensor",
}


def has_gpu() -> bool:
    """Return whether this process computes on a CUDA device."""
    return torch.cuda.is_available()


def device(local_rank: int = 0) -> torch.device:
    """Return the device of this process: GPU ``local_rank`` of this machine, or the CPU."""
    return torch.device("cuda", local_rank) if has_gpu() else torch.device("cpu")


def backend() -> str:
    """Return the torch.distributed backend for that device: ``nccl`` or ``gloo``."""
    return "nccl" if has_gpu() else "gloo"


def check_backend(config: Config) -> None:
    """Refuse backends that are not installed, and collectives that gloo does not support.

    Raises:
        UserError: The backend cannot run here; the message names the flag and what works instead.
    """
    if config.model.transformer_impl == "transformer_engine" and find_spec("transformer_engine") is None:
        raise UserError(
            "--transformer-impl transformer_engine: the package transformer-engine is not installed; "
            "on a CUDA machine pip install -e '.[gpu]' in the checkout, or use --transformer-impl local"
        )
    attention = config.tidar.attention_backend
    if attention == "transformer_engine" and find_spec("transformer_engine") is None:
        raise UserError(
            "--attention-backend transformer_engine: the package transformer-engine is not installed; "
            "on a CUDA machine pip install -e '.[gpu]' in the checkout, or use --attention-backend auto"
        )
    if attention in ("flex", "transformer_engine") and not has_gpu():
        raise UserError(
            f"--attention-backend {attention}: needs a CUDA device (FlexAttention has no backward on CPUs); "
            "use --attention-backend auto"
        )
    if attention in ("flex", "transformer_engine") and config.model.head_channels < 16:
        raise UserError(
            f"--attention-backend {attention}: its kernels need at least 16 channels per head, the model has "
            f"{config.model.head_channels}; use --attention-backend auto"
        )
    if attention == "transformer_engine" and not config.training.bf16:
        raise UserError(
            "--attention-backend transformer_engine: its fused kernels need --bf16; or use --attention-backend auto"
        )
    parallel, dispatcher = config.parallel, config.model.moe_token_dispatcher_type
    if has_gpu() or dispatcher == "allgather":
        return
    if parallel.expert_model_parallel_size > 1 and parallel.expert_tensor_parallel_size > 1:
        raise UserError(
            f"--moe-token-dispatcher-type {dispatcher} with --expert-tensor-parallel-size "
            f"{parallel.expert_tensor_parallel_size}: gathers parts of unequal size, which gloo does not support; "
            "on CPUs use --moe-token-dispatcher-type allgather"
        )


@contextlib.contextmanager
def pretend_current_device(where: torch.device) -> Iterator[None]:
    """Make megatron-core allocate on ``where`` what it puts on the current CUDA device (gradients, main weights)."""
    before = torch.cuda.current_device
    torch.cuda.current_device = lambda: where
    try:
        yield
    finally:
        torch.cuda.current_device = before


class _CudaLiteralsToCpu(TorchFunctionMode):
    """A mode in which ``device="cuda"`` means cpu, ``Tensor.cuda()`` is a no-op, ``Tensor.type()`` gives CUDA names."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if not kwargs:  # of most calls, and every call of a run passes here
            kwargs = {}
        else:
            if str(kwargs.get("device", "")).startswith("cuda"):
                kwargs = {**kwargs, "device": "cpu"}
            if "pin_memory" in kwargs:
                kwargs = {name: value for name, value in kwargs.items() if name != "pin_memory"}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return _CUDA_TYPE_NAMES.get(args[0].dtype) or func(*args)
        return func(*args, **kwargs)


_installed: _CudaLiteralsToCpu | None = None


def make_cpu_first_class() -> None:
    """Patch megatron-core (0.16.1 to 0.19.x) so that it runs without CUDA; a no-op where CUDA is available."""
    global _installed
    if has_gpu() or _installed is not None:
        return
    keep_freed_memory()
    cpu = torch.device("cpu")
    torch.cuda.current_device = lambda: cpu  # megatron-core uses it only as device=...
    torch.cuda.synchronize = lambda *args, **kwargs: None
    torch.cuda.current_stream = lambda *args, **kwargs: None  # megatron-core 0.19 and later call it
    _install_cpu_rng_tracker()
    _install_cpu_dispatcher()
    _installed = _CudaLiteralsToCpu()
    _installed.__enter__()


@contextlib.contextmanager
def literals_as_they_are() -> Iterator[None]:
    """Suspend the CUDA-to-CPU translation in this block, for code that names no CUDA device but makes many small calls.

    The translation costs some microseconds per call: a third of the time that preparing a save takes.
    """
    if _installed is None:
        yield
        return
    _installed.__exit__(None, None, None)
    try:
        yield
    finally:
        _installed.__enter__()


def stopwatch(where: torch.device) -> Callable[[], Callable[[], float]]:
    """Start to time the work of device ``where``.

    Returns:
        A function that stops the clock. It returns another function, which returns the seconds; only that one waits
        for the GPU.
    """
    if where.type != "cuda":
        begin = time.perf_counter()

        def stop() -> Callable[[], float]:
            seconds = time.perf_counter() - begin
            return lambda: seconds

        return stop
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()

    def record() -> Callable[[], float]:
        ended.record()

        def seconds() -> float:
            ended.synchronize()
            return began.elapsed_time(ended) / 1000

        return seconds

    return record


def keep_freed_memory() -> None:
    """Make glibc keep freed memory for the next tensors.

    By default it returns tensors of more than 32 MiB to the system at once and gets them back page by page, zeroed.
    That takes a sixth of a small model's step at S = 4096.
    """
    mmap_max, trim_threshold, top_pad = -4, -1, -2  # M_MMAP_MAX, M_TRIM_THRESHOLD and M_TOP_PAD of malloc.h
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(top_pad, 64 * 2**20)


def _install_cpu_dispatcher() -> None:
    """Patch the MoE dispatcher: no side stream for the split sizes, and Python ints for gloo's all-to-all."""
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None  # 0.16.1 reads it even without transformer-engine
    dispatcher = token_dispatcher.MoEAlltoAllTokenDispatcher
    dispatcher.cuda_dtoh_stream = object()  # otherwise its __init__ makes a CUDA stream

    def to_host(self: Any, point: str, tokens_per_expert: torch.Tensor | None = None) -> torch.Tensor | None:
        if not self.drop_and_pad and point == self.cuda_dtoh_point:
            for name in ("input_splits", "output_splits"):
                if isinstance(splits := getattr(self, name), torch.Tensor):
                    setattr(self, name, splits.tolist())
        return tokens_per_expert

    dispatcher._maybe_dtoh_and_synchronize = to_host


def _install_cpu_rng_tracker() -> None:
    """Implement megatron-core's named random streams on the CPU generator."""
    from megatron.core.tensor_parallel import random as mcore_random

    class CpuRNGStatesTracker(mcore_random.CudaRNGStatesTracker):
        def add(self, name: str, seed: int) -> None:
            self._is_initialized = True
            if seed in self.seeds_ or name in self.states_:
                raise ValueError(f"random stream {name!r} or seed {seed} exists already")
            self.seeds_.add(seed)
            self.states_[name] = torch.Generator().manual_seed(seed).get_state()

        @contextlib.contextmanager
        def fork(self, name: str = mcore_random._MODEL_PARALLEL_RNG_TRACKER_NAME) -> Iterator[None]:
            outer_state, outer_name = torch.get_rng_state(), self._current_state_name  # type: ignore[has-type]
            if outer_name != "default-rng":
                self.states_[outer_name] = outer_state
            torch.set_rng_state(self.states_[name])
            self._current_state_name = name
            try:
                yield
            finally:
                self.states_[name] = torch.get_rng_state()
                # a nested fork of the outer stream has advanced it
                torch.set_rng_state(self.states_.get(outer_name, outer_state))
                self._current_state_name = outer_name

    def get_state(device: Any = "cpu", clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(new_state: torch.Tensor, device: Any = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(new_state)

    mcore_random.CudaRNGStatesTracker = CpuRNGStatesTracker
    mcore_random._get_cuda_rng_state = get_state
    mcore_random._set_cuda_rng_state = set_state
    mcore_random._CUDA_RNG_STATE_TRACKER = None
    mcore_random._CUDA_RNG_STATE_TRACKER_INITIALIZED = False


def start_compile_workers() -> None:
    """Start the processes in which Inductor compiles for the GPU; without a GPU nothing is compiled, and none start.

    They would start with the first compilation, in whatever thread and with whatever signal mask that has.
    """
    if has_gpu():
        with contextlib.suppress(ImportError):  # not in this torch: they start later
            from torch._inductor.async_compile import maybe_warm_pool

            maybe_warm_pool()


def peak_memory() -> int:
    """Return the peak memory of this process so far, in bytes: of its tensors on the GPU, else its resident set."""
    if has_gpu():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
