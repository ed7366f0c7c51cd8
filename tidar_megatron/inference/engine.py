"""The engine: continuous batching of many requests, with one forward per step.

In each step, every sequence that has a slot contributes its part, a chunk of its prompt or its drafts. One forward
serves all parts (``forward.py``), and each sequence then verifies its own drafts (``sequence.py``). A sequence that
ends frees its slot at once, and the next waiting sequence takes the slot in the following step. The result of a
sequence does not depend on the others in the forward, except through the rounding of matrix products of other shapes.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Tokens
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor

from tidar_megatron.errors import UserError
from tidar_megatron.inference.draft_weights import Drafted
from tidar_megatron.inference.logits import Best, Rows, pick
from tidar_megatron.inference.model import DecodeModel
from tidar_megatron.inference.planner import Planner, planner_of
from tidar_megatron.inference.request import DecodeOptions, Generation, Step
from tidar_megatron.inference.sequence import Sequence
from tidar_megatron.inference.static import borrow

PROMPT_CHUNK = 512  # most prompt tokens of a sequence per forward, so that a long prompt does not stall the others


class Engine:
    """A continuously batched decoder for many requests.

    Args:
        model: The model that :func:`~tidar_megatron.inference.loading.load_model` returned.
        batch_size: The largest number of sequences in a forward.
        capacity: The size of a slot in tokens, at least the :attr:`Sequence.room` of the longest request.
        queue_size: The queue length: how many requests may wait beyond those for which a slot is free.
        static: Whether decode steps use few static shapes; see :class:`~tidar_megatron.inference.static.Forwards`. The
            model keeps those of an engine that is gone for the next one.
        prompt_chunk: The most tokens of a prompt in a forward.
        planner: The planner of sequences in mode ``auto``; by default the one that all engines of the model share.

    Raises:
        UserError: the batch size is below 1.
    """

    def __init__(
        self,
        model: DecodeModel,
        batch_size: int,
        capacity: int,
        queue_size: int = 1024,
        static: bool | None = None,
        prompt_chunk: int = PROMPT_CHUNK,
        planner: Planner | None = None,
    ) -> None:
        if batch_size < 1:
            raise UserError(f"batch size {batch_size}: must be at least 1")
        self.model = model
        self.capacity = capacity
        self._forwards = borrow(model, batch_size, capacity, static, self)
        self._free = list(range(batch_size))[::-1]
        self._waiting: deque[Sequence] = deque()
        self._queue_size = queue_size
        self._prompt_chunk = prompt_chunk
        self._active: list[Sequence] = []
        self._planner = planner

    @property
    def planner(self) -> Planner:
        """The planner of all sequences in mode ``auto``, created when it is first needed."""
        if self._planner is None:
            self._planner = planner_of(self.model, self._forwards.pool.slots)
        return self._planner

    @property
    def is_idle(self) -> bool:
        """Return whether no request is active or waiting."""
        return not self._active and not self._waiting

    def submit(self, prompt: Tokens[int], options: DecodeOptions | None = None) -> Sequence:
        """Queue a request for :meth:`step` to serve.

        Args:
            prompt: Token ids of the prompt.
            options: How to generate; None for the defaults.

        Returns:
            The request's sequence, whose ``tokens`` grow with each step.

        Raises:
            UserError: the request cannot be served, or the queue is full.
        """
        return self.enqueue(Sequence(self.model, prompt, options or DecodeOptions()))

    def enqueue(self, sequence: Sequence) -> Sequence:
        """Queue a sequence that the caller has created; see :meth:`submit`.

        Raises:
            UserError: the sequence does not fit in a slot, or the queue is full.
        """
        if sequence.room > self.capacity:
            raise UserError(
                f"the request needs room for {sequence.room} tokens and the engine's slots have {self.capacity}: "
                "ask for fewer new tokens or drafts, or make the engine's capacity larger"
            )
        if len(self._waiting) >= self._queue_size + len(self._free):
            raise UserError(f"{len(self._waiting)} requests are waiting already: try again later")
        if sequence.is_planned:
            sequence.follow(self.planner)
        self._waiting.append(sequence)
        return sequence

    def cancel(self, sequence: Sequence) -> None:
        """Cancel a request; this is a no-op if it has already ended."""
        if sequence in self._active:
            self._leave(sequence)
        elif sequence in self._waiting:
            self._waiting.remove(sequence)
        sequence.stop = sequence.stop or "cancelled"

    @torch.inference_mode()
    def step(self) -> list[tuple[Sequence, Step]]:
        """Run one forward and return its :class:`Step` for each sequence served; a failing sequence ends alone."""
        start = time.perf_counter()
        while self._free and self._waiting:
            sequence = self._waiting.popleft()
            sequence.slot = self._free.pop()
            self._active.append(sequence)
            self._active.sort(key=lambda other: other.slot or 0)  # the order of the slots, as PackedForward prefers
        if not self._active:
            return []
        served = list(self._active)
        planner = self.planner if any(sequence.is_planned for sequence in served) else None
        before, context, reads_prompts = [], 0, False
        for sequence in served:
            context += sequence.context
            is_prompt = sequence.reads_prompt
            reads_prompts |= is_prompt
            before.append((sequence, is_prompt, len(sequence.tokens)))
        if planner is not None:
            planner.begin(len(served), context / len(served))
        contents = [sequence.part(self._prompt_chunk) for sequence in served]
        begin = time.perf_counter()
        hidden, packed = self._forwards.run(contents, reads_prompts)
        static = self._forwards.is_static
        greedy = any(sequence.options.sampling.greedy for sequence in served)
        confidences = any(sequence.wants_confidences for sequence in served)
        logits = _Logits(self.model, hidden, packed.starts, not reads_prompts, static, greedy, confidences)
        verified = logits.of([s.rows for s in served])
        in_forward = time.perf_counter() - begin
        for sequence, of_rows in zip(served, verified, strict=True):
            _guarded(sequence, sequence.accept, of_rows)
        rows = [sequence.draft_rows for sequence in served]
        if any(rows):
            begin = time.perf_counter()
            found = logits.of(rows, confidences)
            in_forward += time.perf_counter() - begin
            offered = logits.offered(rows, found, served)
            for sequence, own, of_rows, drafts in zip(served, rows, found, offered, strict=True):
                if own:
                    decide = sequence.draft if drafts is None else partial(sequence.draft, offered=drafts)
                    _guarded(sequence, decide, of_rows)
        parts = {sequence: sequence.last_part.layout.num_tokens for sequence in served}
        seconds, size = time.perf_counter() - start, sum(parts.values())
        if planner is not None:
            is_its_own = not reads_prompts and all(s.is_planned for s in served)
            timed = greedy or self.model.device.type == "cpu"  # else a GPU may not have run the forward by then
            planner.end(size, seconds if is_its_own else None, seconds - in_forward if timed else 0.0)
        done = []
        for sequence, is_prompt, n in before:
            if sequence.stop is not None:
                self._leave(sequence)
            tokens, logprobs = sequence.tokens[n:], sequence.logprobs[n:]
            share = seconds * parts[sequence] / size
            done.append((sequence, Step(tokens, seconds, sequence.stop, is_prompt, logprobs, size, share)))
        return done

    def _leave(self, sequence: Sequence) -> None:
        self._active.remove(sequence)
        assert sequence.slot is not None
        if sequence.error is not None or sequence.stop is None:  # failed, or cancelled before its end was known
            self._forwards.pool.clear(sequence.slot)
        self._free.append(sequence.slot)
        self._free.sort(reverse=True)  # hand out the lowest slot first, to keep active slots adjacent
        sequence.slot = None


class _Logits:
    """The logits of a forward, computed only for the requested rows, or for all rows at once.

    Each call reads the full output layer, which dominates the cost of a call with few rows.

    Args:
        model: The model.
        hidden: The hidden states of the forward, ``[tokens, hidden]``.
        starts: The first row of each sequence.
        at_once: Whether the logits of all rows may be computed at once. On a CPU that pays off for few rows.
        static: Whether to compute all rows whatever their number: on a GPU more rows cost little, and each further copy
            to the host would wait for the forward.
        greedy: Whether to copy the likeliest tokens to the host, those of all sequences together.
        confidences: Whether that needs the probabilities of drafts. If ``static``, those of all rows are computed.
    """

    FEW = 32

    def __init__(
        self,
        model: DecodeModel,
        hidden: Tensor,
        starts: Tokens[int],
        at_once: bool,
        static: bool,
        greedy: bool,
        confidences: bool,
    ) -> None:
        self._model, self._hidden, self._starts, self._greedy = model, hidden, starts, greedy
        self._all: Rows | None = None
        if at_once and (static or len(hidden) <= self.FEW):
            self._all = self._rows(hidden, static and confidences)

    def of(self, rows: Tokens[Tokens[int]], confidences: bool = False) -> Tokens[Rows]:
        """Return the logits of each sequence's ``rows``, which are relative to its first row.

        With ``confidences`` they come with the probabilities of the likeliest tokens, unless all rows were computed
        without: a sequence then computes those of its few drafts itself.
        """
        if self._all is not None:
            return [self._all.pick(start, own) for start, own in zip(self._starts, rows, strict=True)]
        wanted = [pick(self._hidden, start, own) for start, own in zip(self._starts, rows, strict=True)]
        together = self._rows(torch.cat(wanted) if len(wanted) > 1 else wanted[0], confidences)
        edges = accumulate(map(len, wanted), initial=0)
        return [together.pick(start, range(len(own))) for start, own in zip(edges, wanted, strict=False)]

    def offered(
        self, rows: Tokens[Tokens[int]], found: Tokens[Rows], served: Tokens[Sequence]
    ) -> Tokens[Drafted | None]:
        """Return what the model's selector offers for the masks at ``rows`` of each sequence; None where it has none.

        Args:
            rows: Relative to the first row of each sequence.
            found: Their logits.
            served: The sequences; the last token of each, the certain one, stands before its first mask.
        """
        selector = self._model.drafts.selector if self._model.drafts is not None else None
        if selector is None:
            return [None] * len(rows)
        drafting = [number for number, own in enumerate(rows) if own]
        states = [pick(self._hidden, self._starts[number], rows[number]) for number in drafting]
        sizes = [len(rows[number]) for number in drafting]
        firsts = list(accumulate(sizes[:-1], initial=0))
        logits = torch.cat([found[number].logits for number in drafting])
        scored = selector.score(logits, torch.cat(states), firsts, [served[number].tokens[-1] for number in drafting])
        apart = iter(scored.split(sizes))
        return [next(apart) if own else None for own in rows]

    def _rows(self, hidden: Tensor, probabilities: bool) -> Rows:
        if not len(hidden):
            return Rows(hidden)
        logits = self._model.logits(hidden)
        return Rows(logits, Best.of(logits, probabilities) if self._greedy else None)


def _guarded(sequence: Sequence, decide: Callable[[Tensor, Best | None], object], rows: Rows) -> None:
    """Call ``decide`` and record an exception in the sequence, so that it does not end the others."""
    try:
        decide(*rows)
    except Exception as error:
        sequence.stop, sequence.error = "error", error


def stream(model: DecodeModel, prompt: Tokens[int], options: DecodeOptions | None = None) -> Iterator[Step]:
    """Generate for one prompt and yield one :class:`Step` per forward, starting with those of the prompt.

    Args:
        model: The model that :func:`~tidar_megatron.inference.loading.load_model` returned.
        prompt: Token ids of the prompt. Prompt and output together never exceed ``model.context_limit`` tokens.
        options: How to generate; None for the defaults.

    Raises:
        UserError: the options or the prompt cannot be served; raised by the call itself, before the first step.
    """
    sequence = Sequence(model, prompt, options or DecodeOptions())
    engine = Engine(model, 1, sequence.room)
    return _steps(engine, engine.enqueue(sequence))


def _steps(engine: Engine, sequence: Sequence) -> Iterator[Step]:
    while not engine.is_idle:
        for _, step in engine.step():
            if sequence.error is not None:
                raise sequence.error
            yield step


def generate(
    model: DecodeModel,
    prompt: Tokens[int],
    options: DecodeOptions | None = None,
    on_step: Callable[[Step], None] | None = None,
) -> Generation:
    """Generate for one prompt until the end; see :func:`stream`.

    Args:
        model: The model that :func:`~tidar_megatron.inference.loading.load_model` returned.
        prompt: Token ids of the prompt. Prompt and output together never exceed ``model.context_limit`` tokens.
        options: How to generate; None for the defaults.
        on_step: A callback that is called with every step as soon as it is done.

    Raises:
        UserError: the options or the prompt cannot be served.
    """
    options = options or DecodeOptions()
    generation = Generation.of(model, options)
    for step in stream(model, prompt, options):
        generation.add(step)
        if on_step is not None:
            on_step(step)
    return generation


def generate_batch(
    model: DecodeModel,
    prompts: Tokens[Tokens[int]],
    options: DecodeOptions | Tokens[DecodeOptions] | None = None,
    batch_size: int = 8,
) -> list[Generation]:
    """Generate for many prompts, up to ``batch_size`` at a time; each gets the tokens that it would get alone.

    Args:
        model: The model that :func:`~tidar_megatron.inference.loading.load_model` returned.
        prompts: Token ids of each prompt.
        options: How to generate: one for all prompts, or one per prompt.
        batch_size: The largest number of sequences in a forward.

    Returns:
        One generation per prompt, in order.

    Raises:
        UserError: options or a prompt cannot be served; raised before anything is generated.
    """
    if options is None or isinstance(options, DecodeOptions):
        options = [options or DecodeOptions()] * len(prompts)
    sequences = [Sequence(model, *request) for request in zip(prompts, options, strict=True)]
    room = max((sequence.room for sequence in sequences), default=0)
    engine = Engine(model, batch_size, room, queue_size=len(prompts))
    generations = {engine.enqueue(one): Generation.of(model, one.options) for one in sequences}
    while not engine.is_idle:
        for sequence, step in engine.step():
            if sequence.error is not None:
                raise sequence.error
            generations[sequence].add(step)
    return list(generations.values())
