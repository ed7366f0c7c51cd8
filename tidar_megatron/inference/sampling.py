"""Speculative sampling: the output has the distribution of plain AR sampling, whatever the drafts are.

Let p be the model's distribution of the next token after the request's processors (in transformers' order: repetition
penalty, minimum length, temperature, top-k, top-p, min-p), and q the distribution that a draft was drawn from. A draft
x is accepted with probability min(1, p(x) / q(x)). The token in place of the first rejected draft is drawn from
max(p - q, 0), normalized; if all drafts are accepted, one more token is drawn from p (arXiv 2211.17192, theorem 1;
arXiv 2302.01318). Greedy decoding is temperature 0: a draft is accepted if it is the argmax.

Each request has its own random generator, so its draws do not depend on the rest of the batch.

Shapes: n rows, where row i is the model's prediction after the i-th draft; V vocabulary.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tidar_megatron.errors import UserError
from tidar_megatron.inference.logits import Best

COLDEST = 1e-4  # the lowest temperature above 0 that logits can be divided by
FEW = 256  # tokens that top-p sorts first; it sorts more if they do not make up its share
NO_NUMBERS, EXPORT = "the model's logits are NaN or infinite", "copy or export the model again"


@dataclass(frozen=True)
class SamplingOptions:
    """The options for choosing the next token. The defaults are greedy decoding.

    ``temperature`` 0 takes the likeliest token. ``top_k`` None, ``top_p`` 1, ``min_p`` 0 and ``repetition_penalty`` 1
    have no effect. No end-of-sequence token is emitted before ``min_new_tokens``. With a ``seed`` and a fixed plan,
    every run draws the same tokens. Mode ``auto`` plans by measured time, so its draws may differ between runs.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    min_new_tokens: int = 0
    seed: int | None = None

    def check(self) -> None:
        """Check that all values are valid.

        Raises:
            UserError: a value has an invalid type or is out of range.
        """
        _number("temperature", self.temperature, 0.0, math.inf, "0 (greedy) or more")
        if 0 < self.temperature < COLDEST:
            raise UserError(f"temperature {self.temperature}: use 0 (greedy), or at least {COLDEST}")
        _number("top-p", self.top_p, 0.0, 1.0, "above 0 and at most 1", above=True)
        _number("min-p", self.min_p, 0.0, 1.0, "from 0 to 1")
        _number("repetition penalty", self.repetition_penalty, 0.0, math.inf, "above 0", above=True)
        for name, value, least in (
            ("top-k", 1 if self.top_k is None else self.top_k, 1),
            ("min new tokens", self.min_new_tokens, 0),
        ):
            if not (isinstance(value, int) and not isinstance(value, bool) and value >= least):
                raise UserError(f"{name} {value!r}: use an integer of at least {least}")
        if self.seed is not None and not (isinstance(self.seed, int) and self.seed >= 0):
            raise UserError(f"seed {self.seed!r}: use an integer of at least 0")

    @property
    def greedy(self) -> bool:
        """Return whether decoding is greedy, so that nothing is drawn."""
        return self.temperature == 0


def _number(name: str, value: float, low: float, high: float, wanted: str, above: bool = False) -> None:
    fits = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not fits or not low <= value <= high or (above and value == low):
        raise UserError(f"{name} {value!r}: must be {wanted}")


def probabilities(logits: Tensor, options: SamplingOptions) -> Tensor:
    """Return the distributions to draw from, float32 ``[n, V]``, given penalized ``logits [n, V]``.

    The temperature must be above 0.
    """
    scores = logits.float() / options.temperature
    if options.top_k is not None and options.top_k < scores.shape[-1]:
        least = scores.topk(options.top_k, dim=-1).values[:, -1:]
        scores = scores.masked_fill(scores < least, -torch.inf)
    if options.top_p < 1:
        scores = _nucleus(scores, options.top_p)
    p = scores.softmax(-1)
    if options.min_p > 0:
        p = p.masked_fill(p < options.min_p * p.max(-1, keepdim=True).values, 0)
        p = p / p.sum(-1, keepdim=True)
    return p


def _nucleus(scores: Tensor, top_p: float) -> Tensor:
    """Return ``scores [n, V]`` with minus infinity outside the likeliest tokens that make up ``top_p``.

    A token is kept if those before it have less than ``top_p``; of equal scores the lower token id comes first.
    """
    few, vocabulary = FEW, scores.shape[-1]
    while True:  # sorting a whole vocabulary takes as long as a small model's forward
        few = min(few, vocabulary)
        values, places = scores.topk(few, dim=-1) if few < vocabulary else (scores, torch.arange(vocabulary))
        places, order = places.to(scores.device).expand_as(values).sort(dim=-1)
        values, order = values.gather(-1, order).sort(dim=-1, descending=True, stable=True)
        shares = (values.double() - scores.double().logsumexp(-1, keepdim=True)).exp()
        is_kept = shares.cumsum(-1) - shares < top_p  # always keeps the likeliest
        # the last of few may have equals that were left out
        if few == vocabulary or not bool((is_kept & (values == values[:, -1:])).any()):
            kept = values.masked_fill(~is_kept, -torch.inf)
            return torch.full_like(scores, -torch.inf).scatter(-1, places.gather(-1, order), kept)
        few *= 16


def penalized(logits: Tensor, penalty: float, seen: Tensor) -> Tensor:
    """Apply a repetition penalty (CTRL, arXiv 1909.05858, section 4.1).

    Args:
        logits: ``[n, V]``.
        penalty: The factor; above 1 makes seen tokens less likely.
        seen: The tokens to penalize, bool ``[n, V]``.
    """
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def draw(weights: Tensor, uniforms: Sequence[float]) -> Tensor:
    """Draw one column per row with probability proportional to its weight (inverse transform sampling).

    Args:
        weights: ``[n, V]``, not negative.
        uniforms: n numbers in [0, 1).

    Returns:
        The columns, int64 ``[n]``.

    Raises:
        UserError: the weights of a row are NaN, infinite or all 0.
    """
    heights = weights.cumsum(-1, dtype=torch.float64)
    total = heights[:, -1:]
    if not bool(((total > 0) & total.isfinite()).all()):
        raise UserError(f"{NO_NUMBERS}: nothing can be drawn from them; {EXPORT}")
    wanted = torch.tensor(uniforms, dtype=torch.float64).unsqueeze(-1).to(weights.device) * total
    wanted = torch.minimum(wanted, torch.nextafter(total, torch.zeros_like(total)))  # u * total may round up to total
    return torch.searchsorted(heights, wanted, right=True).squeeze(-1)


def accepted(p: Tensor, drafts: Tensor, q: Tensor | None, uniforms: Sequence[float]) -> Tensor:
    """Return which drafts are accepted, each considered alone: bool ``[n]``.

    Args:
        p: The model's distributions at the drafts' positions, ``[n, V]``.
        drafts: The drafts, int64 ``[n]``.
        q: The distributions that the drafts were drawn from, ``[n, V]``; None for deterministic ones (argmax, lookup).
        uniforms: n numbers in [0, 1).
    """
    places = drafts.unsqueeze(-1)
    ours = p.gather(-1, places).squeeze(-1).double()
    theirs = 1.0 if q is None else q.gather(-1, places).squeeze(-1).double()
    return torch.tensor(uniforms, dtype=torch.float64).to(p.device) * theirs < ours


def residual(p: Tensor, draft: Tensor, q: Tensor | None) -> Tensor:
    """Return the unnormalized residual distribution, ``[V]``, from which to replace a rejected draft.

    Args:
        p: The model's distribution, ``[V]``.
        draft: The rejected draft, an int64 scalar.
        q: The distribution that the draft was drawn from, ``[V]``; None for a deterministic draft.
    """
    left = p.scatter(-1, draft, 0.0) if q is None else (p - q).clamp(min=0)
    return torch.where(left.sum() > 0, left, p)  # the residual is 0 if p = q up to rounding: then draw from p


class Sampler:
    """The sampler of one request: its options, random generator and seen tokens.

    Args:
        options: The request's sampling options.
        prompt: Token ids of the prompt, which count as seen for the repetition penalty.
        end_of_text: The end-of-sequence ids that ``min_new_tokens`` suppresses.
        vocabulary: The vocabulary size V.
        device: The device of the logits.
    """

    def __init__(
        self,
        options: SamplingOptions,
        prompt: Sequence[int],
        end_of_text: Collection[int],
        vocabulary: int,
        device: torch.device,
    ) -> None:
        self.options = options
        self._random = np.random.Generator(np.random.Philox(options.seed))
        self._end_of_text = sorted(token for token in end_of_text if 0 <= token < vocabulary)
        self._emitted = 0
        self._seen: Tensor | None = None
        if options.repetition_penalty != 1:
            self._seen = torch.zeros(vocabulary, dtype=torch.bool, device=device)
            self._seen[list(prompt)] = True

    def emit(self, tokens: Sequence[int]) -> None:
        """Record tokens that became final."""
        self._emitted += len(tokens)
        if self._seen is not None:
            self._seen[list(tokens)] = True

    @property
    def processes(self) -> bool:
        """Return whether processors may change the argmax of raw logits."""
        return self._seen is not None or self._emitted < self.options.min_new_tokens

    def process(self, logits: Tensor, drafts: Sequence[int]) -> Tensor:
        """Apply repetition penalty and minimum length to each row; return logits ``[n, V]``.

        Args:
            logits: ``[n, V]``; row i follows the first i + 1 drafts.
            drafts: n tokens; the first has been emitted and is final.
        """
        if self._seen is not None:
            seen = self._seen.repeat(len(logits), 1)
            for row, draft in enumerate(drafts):
                seen[row:, draft] = True
            logits = penalized(logits, self.options.repetition_penalty, seen)
        if (short := self.options.min_new_tokens - self._emitted) > 0 and self._end_of_text:
            logits = logits.clone()
            logits[:short, self._end_of_text] = -torch.inf
        return logits

    def uniforms(self, count: int) -> list[float]:
        """Return the next ``count`` random numbers in [0, 1)."""
        return self._random.random(count).tolist()

    def choose(self, logits: Tensor, drafts: Sequence[int], q: Tensor | None, best: Best | None = None) -> list[int]:
        """Verify drafts and choose the token that follows the accepted ones.

        Args:
            logits: The raw logits, ``[n, V]``; row i follows the i-th draft.
            drafts: n tokens; the first is already final.
            q: The distributions that the other drafts were drawn from, ``[n - 1, V]``; None if they are deterministic.
            best: The likeliest tokens of the raw logits, if they are on the host already.

        Returns:
            The accepted drafts without the first, then the new token: 1 to n tokens.

        Raises:
            UserError: the logits are NaN or infinite.
        """
        if self.options.greedy and best is not None and not self.processes:
            return _verified(drafts, best.tokens, best.logits)
        logits = self.process(logits, drafts)
        if self.options.greedy:
            highest, places = logits.max(-1)
            return _verified(drafts, places.tolist(), highest.tolist())
        p, others = probabilities(logits, self.options), torch.tensor(drafts[1:], device=logits.device)
        stays = accepted(p[:-1], others, q, self.uniforms(len(drafts) - 1)).tolist()
        count = stays.index(False) if False in stays else len(stays)
        weights = p[count]
        if count < len(stays):
            weights = residual(weights, others[count], None if q is None else q[count])
        return [*drafts[1 : count + 1], int(draw(weights[None], self.uniforms(1)))]

    def propose(self, logits: Tensor, best: Best | None = None) -> tuple[list[int], Tensor | None]:
        """Return drafts for ``logits [n, V]``, and the distributions ``[n, V]`` behind them (None if greedy).

        ``best`` holds the likeliest tokens of the logits, if they are on the host already.
        """
        if self.options.greedy:
            return best.tokens if best is not None else logits.argmax(-1).tolist(), None
        q = probabilities(logits, self.options)
        return draw(q, self.uniforms(len(q))).tolist(), q

    def walk(self, ids: Tensor, scores: Tensor, vocabulary: int) -> tuple[list[int], Tensor]:
        """Return drafts that are drawn one after another, and the distributions ``[n, V]`` behind them.

        Args:
            ids: The candidates of each mask, int64 ``[n, c]``.
            scores: Their scores after each candidate of the mask before, ``[n, c, c]``.
            vocabulary: V.
        """
        tokens, q, place = [], [], 0
        for candidates, of_each in zip(ids, scores, strict=True):
            logits = of_each.new_full((1, vocabulary), -torch.inf)
            logits[0, candidates] = of_each[place]
            q.append(probabilities(logits, self.options))
            tokens.append(int(draw(q[-1], self.uniforms(1))))
            place = int((candidates == tokens[-1]).int().argmax())
        return tokens, torch.cat(q)


def _verified(drafts: Sequence[int], best: list[int], highest: list[float]) -> list[int]:
    """Return the accepted drafts without the first, then the new token, from the likeliest token after each draft."""
    if any(map(math.isnan, highest)):
        raise UserError(f"{NO_NUMBERS}: there is no likeliest token; {EXPORT}")
    count = 1
    while count < len(drafts) and drafts[count] == best[count - 1]:
        count += 1
    return best[:count]
