"""The time of a decode step against a bare forward of the same tokens under the same mask, and by context length."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor

from tidar_megatron.attention_mask import INDEX, decode_layout, may_attend, prefix_layout
from tidar_megatron.benchmark.decode import text_of
from tidar_megatron.benchmark.measuring import Spread, allocated_bytes, rounded
from tidar_megatron.benchmark.timing import synchronize
from tidar_megatron.evaluation.stock import load_stock
from tidar_megatron.inference.cache import KVPool
from tidar_megatron.inference.engine import Engine
from tidar_megatron.inference.forward import Part
from tidar_megatron.inference.model import DecodeModel, fuse_norms
from tidar_megatron.inference.request import DecodeOptions, parse_plan
from tidar_megatron.inference.sequence import Sequence as Decoding


@dataclass
class Pass:
    """The decode steps of one text, and the bare forwards of the same tokens."""

    step_seconds: list[float] = field(default_factory=list)
    bare_seconds: list[float] = field(default_factory=list)
    tokens: int = 0
    bytes: list[int] = field(default_factory=list)  # bytes allocated by each step


def step(
    model: DecodeModel,
    folder: str | Path,
    prompts: Sequence[Sequence[int]],
    contexts: Sequence[int],
    max_new_tokens: int,
    repeats: int,
) -> dict[str, Any]:
    """Time decode steps and bare forwards for each plan and context length.

    Each step of the engine is followed by the bare forward of its tokens. That is transformers' own model with the
    engine's RMSNorms, torch's scaled-dot-product attention under the mask of the step's tokens, a cache that copies no
    keys or values, and the output layer on as many rows as the step needs. Its time excludes making the mask, choosing
    and accepting tokens, and drafting. On a GPU it is replayed as a CUDA graph, as the engine's forward is.

    Args:
        model: the model to decode with.
        folder: the model's folder, from which transformers loads its own copy.
        prompts: token ids of texts, which are concatenated to contexts of any length.
        contexts: the context lengths, in tokens, with the shortest first.
        max_new_tokens: tokens to generate for each text.
        repeats: passes over all plans and contexts, after one that measures allocations.

    Returns:
        ``rows``, one for each plan and context, and ``skipped``, the contexts that do not fit. ``over_bare`` is the
        ratio of a step's time to its bare forward's, pair by pair; ``over_nearest`` and ``bare_over_nearest`` are the
        ratios of step and bare forward to those at the first context.
    """
    block = model.block_size or 8
    names = ["ar", *(f"{kind}:{block}" for kind in ("linear", "1", "2", "all")), "auto"]
    plans = {name: replace(parse_plan(name), max_new_tokens=max_new_tokens, ignore_eos=True) for name in names}
    bare = Bare(model, folder)
    fitting = [context for context in contexts if context + max_new_tokens <= model.context_limit]
    measured: dict[tuple[str, int], list[Pass]] = {(name, context): [] for name in names for context in fitting}
    for number in range(repeats + 1):
        for name, context in measured:
            done = _pass(model, bare, text_of(prompts, context, number), plans[name], watched=number == 0)
            measured[name, context].append(done)
    rows = []
    for (name, context), (first, *rest) in measured.items():
        near = measured[name, fitting[0]][1:]
        pairs = [pair for done in rest for pair in zip(done.step_seconds, done.bare_seconds, strict=True)]
        rows.append(
            {"plan": name, "context": context, "over_bare": rounded(Spread.of([ours / bare for ours, bare in pairs]))}
            | {"step_milliseconds": round(1e3 * _usual(rest, "step_seconds"), 4)}
            | {"tokens_per_step": round(sum(done.tokens for done in rest) / len(pairs), 3)}
            | {"over_nearest": round(_usual(rest, "step_seconds") / _usual(near, "step_seconds"), 3)}
            | {"bare_over_nearest": round(_usual(rest, "bare_seconds") / _usual(near, "bare_seconds"), 3)}
            | {"bytes_per_step": max(first.bytes)}
        )
    return {"rows": rows, "skipped": [context for context in contexts if context not in fitting]}


def _usual(passes: Sequence[Pass], which: str) -> float:
    """Return the median over passes of the mean over steps, which differ in size."""
    return median(fmean(getattr(done, which)) for done in passes)


def _pass(model: DecodeModel, bare: "Bare", text: Sequence[int], options: DecodeOptions, watched: bool) -> Pass:
    engine = Engine(model, 1, Decoding(model, text, options).room)
    sequence = engine.submit(text, options)
    while sequence.reads_prompt:
        engine.step()
    bare.make_room(engine.capacity)
    done = Pass()
    while not engine.is_idle:
        if watched:
            done.bytes.append(allocated_bytes(engine.step))
            continue
        start = time.perf_counter()
        ((_, made),) = engine.step()
        done.step_seconds.append(time.perf_counter() - start)
        done.tokens += len(made.tokens)
        layout = sequence.last_part.layout
        drafting = layout.rows_after(len(made.tokens)) if made.stop is None else ()
        done.bare_seconds.append(bare.seconds(sequence.last_part, layout.num_drafts + len(drafting)))
    return done


class Bare:
    """transformers' own model of the same weights, called directly."""

    def __init__(self, model: DecodeModel, folder: str | Path) -> None:
        self._causal_lm = load_stock(folder, model)
        fuse_norms(self._causal_lm)
        self._mask_token_id = model.mask_token_id
        self._pool = KVPool(1, 1)

    def make_room(self, capacity: int) -> None:
        """Make a cache for texts of up to ``capacity`` tokens; its contents do not matter."""
        self._pool = KVPool(1, capacity)

    @torch.inference_mode()
    def seconds(self, part: Part, rows: int) -> float:
        """Return the seconds of one forward of the part, with logits for ``rows`` rows."""
        layout, device = part.layout, self._causal_lm.device
        tokens = decode_layout(0, layout.num_drafts, layout.branches, layout.draft_length)
        visible = may_attend(tokens, torch.cat([prefix_layout(0), tokens]))
        mask = torch.zeros(layout.num_tokens, part.length + layout.num_tokens, dtype=self._causal_lm.dtype)
        mask[:, part.length :].masked_fill_(~visible, torch.finfo(mask.dtype).min)
        ids = torch.tensor([[*part.tokens, *[self._mask_token_id] * layout.num_masks]], device=device)
        positions = (part.length + tokens[:, INDEX])[None].to(device)
        bias = None if layout.num_tokens == 1 else mask[None, None].to(device)
        run: Callable[[], object] = partial(
            self._causal_lm,
            input_ids=ids,
            position_ids=positions,
            attention_mask=bias,
            past_key_values=_Room(self._pool, part.length),
            logits_to_keep=rows,
        )
        if device.type == "cuda":
            run = captured(run, device)
        start = time.perf_counter()
        run()
        synchronize(device)
        return time.perf_counter() - start


def captured(run: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """Return a function that replays the kernels of ``run`` as a CUDA graph, as the engine replays its own."""
    with torch.cuda.device(device):
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            run()  # libraries choose their kernels
        torch.cuda.current_stream(device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
    graph.replay()
    torch.cuda.synchronize(device)
    return graph.replay


class _Room:
    """A pool behind the cache interface of transformers' models, which read views of it."""

    is_compileable = False

    def __init__(self, pool: KVPool, length: int) -> None:
        self._pool, self._length = pool, length

    def update(self, key: Tensor, value: Tensor, layer: int, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        return self._pool.write(layer, 0, self._length, key, value)

    def get_seq_length(self, layer: int = 0) -> int:
        return self._length

    def get_query_offset(self, layer: int = 0) -> int:
        return self._length

    def get_mask_sizes(self, tokens: int, layer: int = 0) -> tuple[int, int]:
        return self._length + tokens, 0
