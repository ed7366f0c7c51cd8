"""llama.cpp as a way of decoding: the same weights in a GGUF file, plain and with prompt lookup, and quantized.

It needs ``llama-cpp-python`` and ``gguf`` (the extra ``llama``), which are looked for at run time.
"""

import ctypes
import sys
import tempfile
import time
from dataclasses import replace
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from tidar_megatron.benchmark.energy import Sizes, Work
from tidar_megatron.benchmark.gguf_file import why_not, write_gguf
from tidar_megatron.benchmark.ways import Run, Texts, Way
from tidar_megatron.inference.dtype import dtype_name

QUANTIZED = {"Q8_0": "LLAMA_FTYPE_MOSTLY_Q8_0", "Q4_1": "LLAMA_FTYPE_MOSTLY_Q4_1"}
ERROR = 4  # a level of llama.cpp's log
CHUNK = 512  # most tokens of a forward
INSTALL = "llama.cpp: needs llama-cpp-python and gguf; in the checkout, pip install -e '.[llama]'"


def missing(causal_lm: PreTrainedModel) -> str | None:
    """Return why llama.cpp cannot decode with the weights of this model here, or None if it can."""
    if not (find_spec("llama_cpp") and find_spec("gguf")):
        return INSTALL
    reason = why_not(causal_lm)
    return None if reason is None else f"llama.cpp: {reason}"


class LlamaCpp:
    """The files of a model for llama.cpp, in the model's dtype and quantized by llama.cpp; a context manager.

    Attributes:
        bits_per_weight: The bits of a file for each weight, by name: that of the dtype, ``Q8_0``, ``Q4_1``.
        failed: What could not be quantized, and why.
    """

    def __init__(self, causal_lm: PreTrainedModel, sizes: Sizes) -> None:
        import llama_cpp

        llama_cpp.llama_log_set(_only_errors(), None)
        self._sizes = sizes
        self._folder = tempfile.TemporaryDirectory(prefix="tidar-llama-")
        name = dtype_name(causal_lm.dtype)
        source = Path(self._folder.name) / "model.gguf"
        write_gguf(causal_lm, source)
        self._files = {name: source}
        self.failed: list[str] = []
        for name, file_type in QUANTIZED.items():
            path = source.with_name(f"{name}.gguf")
            how = llama_cpp.llama_model_quantize_default_params()
            how.ftype, how.nthread = getattr(llama_cpp, file_type), torch.get_num_threads()
            if llama_cpp.llama_model_quantize(str(source).encode(), str(path).encode(), ctypes.byref(how)):
                self.failed.append(f"llama.cpp {name}: llama.cpp cannot quantize this model")
            else:
                self._files[name] = path
        self._kv_elements = sizes.kv_bytes // causal_lm.dtype.itemsize
        tied = causal_lm.config.tie_word_embeddings
        self._weights = sizes.weights + sizes.output_weights * (1 if tied else 2)  # those of a file
        self._read = (sizes.weights + sizes.output_weights) / self._weights  # the share that a forward reads

    @property
    def bits_per_weight(self) -> dict[str, float]:
        """The bits of each file per weight."""
        return {name: round(8 * path.stat().st_size / self._weights, 2) for name, path in self._files.items()}

    def __enter__(self) -> "LlamaCpp":
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    def ways(self, room: int, max_new_tokens: int, lookup: int) -> dict[str, Way]:
        """Load the files, and return ways to decode one text with them, such as ``llama.cpp Q8_0 lookup``.

        Args:
            room: The most tokens of a text, the new ones included.
            max_new_tokens: The new tokens.
            lookup: The most tokens that prompt lookup drafts.
        """
        import llama_cpp
        from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

        threads = torch.get_num_threads()
        found: dict[str, Way] = {}
        for name, path in self._files.items():
            # K/V are float16, llama.cpp's default, unless that would make the tokens of float32 weights others
            kv_type, kv_bytes = (llama_cpp.GGML_TYPE_F32, 4) if name == "float32" else (llama_cpp.GGML_TYPE_F16, 2)
            read = int(path.stat().st_size * self._read)
            sizes = replace(self._sizes, weight_bytes=read, kv_bytes=kv_bytes * self._kv_elements)
            for copies in (False, True):
                # logits of all tokens are kept in an array of the context's size, and drafts may fill the context
                model = llama_cpp.Llama(
                    str(path),
                    n_ctx=-(-(room + lookup) // 256) * 256,
                    n_batch=CHUNK,
                    n_threads=threads,
                    n_threads_batch=threads,
                    type_k=kv_type,
                    type_v=kv_type,
                    logits_all=copies,
                    draft_model=LlamaPromptLookupDecoding(num_pred_tokens=lookup) if copies else None,
                    verbose=False,
                )
                found[f"llama.cpp {name}{' lookup' if copies else ''}"] = partial(_decode, model, sizes, max_new_tokens)
        return found


@cache  # llama.cpp calls it as long as the process lives
def _only_errors() -> Any:
    """Return a function that prints llama.cpp's errors, and none of its notes and warnings."""
    import llama_cpp

    def log(level: int, text: bytes, _: object) -> None:
        if level == ERROR:
            print(text.decode(errors="replace"), end="", file=sys.stderr)

    return llama_cpp.llama_log_callback(log)


def _decode(model: Any, sizes: Sizes, max_new_tokens: int, texts: Texts) -> Run:
    """Decode one text greedily, whatever tokens come."""
    (text,) = texts
    work, forwards = Work(sizes), 0
    evaluate = type(model).eval

    def counted(tokens: list[int]) -> None:
        nonlocal forwards
        forwards += 1
        for start in range(0, len(tokens), CHUNK):
            part = len(tokens[start : start + CHUNK])
            rows = part if model.draft_model is not None else 1
            work.add([(model.n_tokens + start, part)], rows)
        evaluate(model, tokens)

    model.eval = counted
    model.reset()  # it would go on after what is known of the text
    start = time.perf_counter()
    found: list[int] = []
    first = 0.0
    for token in model.generate(list(text), top_k=1, temp=0.0, repeat_penalty=1.0):
        first = first or time.perf_counter() - start
        found.append(int(token))
        if len(found) == max_new_tokens:
            break
    return Run([found], forwards, first, work)
