"""Detect and skip bad steps: NaN or infinite losses and gradients, and loss spikes.

After the backward pass, before the update, every rank judges the step by the global loss and the norm of the full
gradient, and the ranks agree on the worst verdict. A step whose loss or gradient is NaN or infinite is always skipped:
weights, Adam's moments and step count and the learning-rate schedule stay bitwise unchanged, and its samples count as
consumed. A loss spike, more than ``--loss-spike-factor`` times the median of the last losses, is reported or skipped,
as ``--loss-spike-action`` says. Too many skipped steps in a row end the run, because a single bad sample cannot be the
cause.

The checkpoint keeps the last losses across a restart. They are cleared when the joint objective begins, because its
losses are not comparable to those of the AR warm-up.
"""

import math
from collections import deque
from collections.abc import Callable
from statistics import median
from typing import Any

from tidar_megatron.config import HealthConfig
from tidar_megatron.distributed.groups import Ranks
from tidar_megatron.errors import Diverged

SOUND, SPIKE, NO_NUMBER = range(3)  # verdicts, the worst last


class Health:
    """The health checks of a run.

    Args:
        config: The limits.
        ranks: The ranks that have to agree on a verdict.

    Attributes:
        skipped: The number of skipped steps since the run began.
        spikes: The number of steps since then whose loss was a spike.
        on_trouble: A function that every rank calls with a sentence about each bad step.
    """

    def __init__(self, config: HealthConfig, ranks: Ranks) -> None:
        self.skipped = self.spikes = 0
        self.on_trouble: Callable[[str], None] = lambda sentence: None
        self._config, self._ranks = config, ranks
        self._in_a_row = 0
        self._phase = ""
        self._losses: deque[float] = deque(maxlen=config.loss_spike_window)

    def approve(self, step: int, phase: str, loss: float, grad_norm: float) -> bool:
        """Return, on every rank, whether the optimizer may take this step. Collective.

        Args:
            step: The number of the step, from 1.
            phase: The name of the objective; losses are compared only within one phase.
            loss: The loss of the global batch.
            grad_norm: The norm of the full gradient.

        Raises:
            Diverged: ``--max-skipped-iterations-in-a-row`` steps in a row were skipped.
        """
        if phase != self._phase:
            self._phase = phase
            self._losses.clear()
        verdict = self._ranks.largest(self._verdict(loss, grad_norm))
        what = f"step {step}: {self._reason(verdict, loss, grad_norm)}"
        self.spikes += verdict == SPIKE
        if verdict == SOUND or (verdict == SPIKE and self._config.loss_spike_action == "flag"):
            self._losses.append(loss)
            self._in_a_row = 0
            if verdict == SPIKE:
                self.on_trouble(what)
            return True
        self.skipped, self._in_a_row = self.skipped + 1, self._in_a_row + 1
        self.on_trouble(f"{what}; skipped, {self._in_a_row} in a row")
        if self._in_a_row >= self._config.max_skipped_iterations_in_a_row:
            raise Diverged(
                f"{what}; {self._in_a_row} steps in a row were skipped (--max-skipped-iterations-in-a-row); resume "
                "from an older checkpoint with a lower --lr, or look at the data of these steps (--log-sample-ids)"
            )
        return False

    def _verdict(self, loss: float, grad_norm: float) -> int:
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return NO_NUMBER
        enough = len(self._losses) >= max(1, self._config.loss_spike_window // 2)
        return SPIKE if enough and loss > self._config.loss_spike_factor * median(self._losses) else SOUND

    def _reason(self, verdict: int, loss: float, grad_norm: float) -> str:
        if verdict == SOUND:
            return "sound"
        if verdict == NO_NUMBER:
            return f"loss {loss:.4g} or gradient norm {grad_norm:.4g} is NaN or infinite on some rank"
        last = f"the median of the last {len(self._losses)} is {median(self._losses or [math.nan]):.4g}"
        return f"loss {loss:.4g} is a spike, {last}"

    def log_values(self) -> dict[str, int]:
        """Return the counts for each line of the log."""
        return {"skipped_iterations": self.skipped, "loss_spikes": self.spikes}

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a restart needs, as JSON values."""
        return {
            "skipped": self.skipped,
            "spikes": self.spikes,
            "in_a_row": self._in_a_row,
            "phase": self._phase,
            "losses": list(self._losses),
        }

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Restore a state from :meth:`state_dict`; only the last losses are kept if the window is now shorter."""
        self.skipped, self.spikes, self._in_a_row = state["skipped"], state["spikes"], state["in_a_row"]
        self._phase = state["phase"]
        self._losses = deque(state["losses"], maxlen=self._config.loss_spike_window)
