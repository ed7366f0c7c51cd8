"""The engine: many requests, one forward a step.

Each step every sequence that has a slot brings its part, a piece of its prompt or its drafts, and one forward serves
all of them (``attention.py``); each then decides for itself (``sequence.py``). A sequence that ends leaves at once and
the next one waiting takes its slot in the step after. Nothing a sequence computes depends on what else is in the
forward, but for the rounding of matrix products of other shapes.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Tokens

import torch
from torch import Tensor

from tidar_megatron.errors import UserError
from tidar_megatron.inference.model import DecodeModel
from tidar_megatron.inference.planner import Planner, planner_of
from tidar_megatron.inference.request import DecodeOptions, Generation, Step
from tidar_megatron.inference.sequence import Sequence
from tidar_megatron.inference.static import Forwards

PROMPT_CHUNK = 512  # prompt tokens of a sequence in a forward: others need not wait for a long one


class Engine:
    """A continuous batch.

    Args:
        model: what :func:`~tidar_megatron.inference.loading.load_model` returned.
        batch_size: sequences in a forward at most.
        capacity: places of each one's slot, :attr:`Sequence.room` of the longest request.
        queue_size: requests that may wait, those aside for which a slot is free.
        static: as :class:`~tidar_megatron.inference.static.Forwards` has it.

    Raises:
        UserError: a batch without slots.
    """

    def __init__(
        self,
        model: DecodeModel,
        batch_size: int,
        capacity: int,
        queue_size: int = 1024,
        static: bool | None = None,
    ) -> None:
        if batch_size < 1:
            raise UserError(f"batch size {batch_size}: must be at least 1")
        self.model = model
        self.capacity = capacity
        self._forwards = Forwards(model, batch_size, capacity, static)
        self._free = list(range(batch_size))[::-1]
        self._waiting: deque[Sequence] = deque()
        self._queue_size = queue_size
        self._active: list[Sequence] = []
        self._planner: Planner | None = None

    @property
    def planner(self) -> Planner:
        """Chooses the plans of all sequences in mode ``auto``; made when the first one comes."""
        if self._planner is None:
            self._planner = planner_of(self.model)
        return self._planner

    @property
    def is_idle(self) -> bool:
        """Whether no request is under way."""
        return not self._active and not self._waiting

    def submit(self, prompt: Tokens[int], options: DecodeOptions | None = None) -> Sequence:
        """A request that :meth:`step` will serve.

        Raises:
            UserError: for a request that cannot be served, or where too many wait.
        """
        return self.enqueue(Sequence(self.model, prompt, options or DecodeOptions()))

    def enqueue(self, sequence: Sequence) -> Sequence:
        """As :meth:`submit`, of a sequence that is made already, perhaps to know how much room it needs."""
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
        """Forget a request; of one that has ended nothing is left to forget."""
        if sequence in self._active:
            self._leave(sequence)
        elif sequence in self._waiting:
            self._waiting.remove(sequence)
        sequence.stop = sequence.stop or "cancelled"

    @torch.inference_mode()
    def step(self) -> list[tuple[Sequence, Step]]:
        """One forward; what it made final for each sequence that is in it. A sequence that fails ends alone."""
        start = time.perf_counter()
        while self._free and self._waiting:
            sequence = self._waiting.popleft()
            sequence.slot = self._free.pop()
            self._active.append(sequence)
            self._active.sort(key=lambda other: other.slot or 0)  # side by side in a forward as in the pool
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
        hidden, packed = self._forwards.run([sequence.part(PROMPT_CHUNK) for sequence in served], reads_prompts)
        logits = _Logits(self.model, hidden, packed.starts, at_once=not reads_prompts)
        for sequence, of_rows in zip(served, logits.of([s.rows for s in served]), strict=True):
            _guarded(sequence, sequence.accept, of_rows)
        rows = [sequence.draft_rows for sequence in served]
        for sequence, of_rows in zip(served, logits.of(rows), strict=True):
            if len(of_rows):
                _guarded(sequence, sequence.draft, of_rows)
        parts = {sequence: sequence.last_part.layout.num_tokens for sequence in served}
        seconds, size = time.perf_counter() - start, sum(parts.values())
        if planner is not None:
            is_its_own = not reads_prompts and all(s.is_planned for s in served)
            planner.end(size, seconds if is_its_own else None)
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
        if sequence.error is not None or sequence.stop is None:  # failed, or cancelled before anything was known
            self._forwards.pool.clear(sequence.slot)
        self._free.append(sequence.slot)
        self._free.sort(reverse=True)  # the lowest first, so that those in use lie together
        sequence.slot = None


class _Logits:
    """Logits of a forward's rows, those alone that are asked for; of a small forward all at once.

    Each call reads the whole output layer, which is most of a call of few rows.
    """

    FEW = 32

    def __init__(self, model: DecodeModel, hidden: Tensor, starts: Tokens[int], at_once: bool) -> None:
        self._model, self._hidden, self._starts = model, hidden, starts
        self._all = model.logits(hidden) if at_once and len(hidden) <= self.FEW else None

    def of(self, rows: Tokens[Tokens[int]]) -> Tokens[Tensor]:
        """``[rows, V]`` for each sequence, whose ``rows`` count from its own first."""
        if self._all is not None:
            return [_pick(self._all, start, own) for start, own in zip(self._starts, rows, strict=True)]
        wanted = [_pick(self._hidden, start, own) for start, own in zip(self._starts, rows, strict=True)]
        if len(wanted) == 1:
            return (self._model.logits(wanted[0]),) if rows[0] else wanted
        together = torch.cat(wanted)
        logits = self._model.logits(together) if len(together) else together
        return logits.split([len(own) for own in rows])


def _pick(tensor: Tensor, start: int, rows: Tokens[int]) -> Tensor:
    """``rows`` behind ``start``; a view where they follow each other."""
    if isinstance(rows, range):
        return tensor[start + rows.start : start + rows.stop]
    return tensor[[start + row for row in rows]]


def _guarded(sequence: Sequence, decide: Callable[[Tensor], object], logits: Tensor) -> None:
    """What goes wrong with one sequence must not end the others."""
    try:
        decide(logits)
    except Exception as error:
        sequence.stop, sequence.error = "error", error


def stream(model: DecodeModel, prompt: Tokens[int], options: DecodeOptions | None = None) -> Iterator[Step]:
    """Generate for one prompt, one :class:`Step` a forward, those of the prompt first.

    Args:
        model: what :func:`~tidar_megatron.inference.loading.load_model` returned.
        prompt: token ids; prompt and output together never exceed ``model.context_limit`` tokens.

    Raises:
        UserError: here and not in the midst of it, for options or a prompt that cannot be served.
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
    """Generate to the end. Arguments and errors as :func:`stream`; ``on_step`` sees every step as it comes."""
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
    """Generate for many prompts, ``batch_size`` at a time; each gives the tokens that it gives alone.

    Args:
        options: of all, or of each.

    Raises:
        UserError: before anything is generated, for options or a prompt that cannot be served.
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
