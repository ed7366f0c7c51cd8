"""Whether a step is to be trusted: gradients that are no numbers, losses that jump, and what is done about them.

After the backward, and before anything is changed, every rank judges the step by the global loss and the norm of the
whole gradient, and the ranks agree on the worst of their verdicts. A step whose loss or gradient is NaN or infinite is
always skipped: weights, Adam's moments and step count and the learning rate's schedule stay as they are to the last
bit, its samples count as consumed. A loss spike, more than ``--loss-spike-factor`` times the median of the last losses,
is told or skipped, as ``--loss-spike-action`` says. Too many skipped steps in a row end the run: by then it is not one
bad sample.

The last losses outlive a restart, in the checkpoint. They begin anew with the joint objective, whose losses are others
than the AR warm-up's.
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
    """One run's.

    Args:
        config: the limits.
        ranks: who has to agree.

    Attributes:
        skipped: steps without an update since the run began.
        spikes: steps since then whose loss was a spike.
        on_trouble: called on every rank with a sentence for each step that is not sound.
    """

    def __init__(self, config: HealthConfig, ranks: Ranks) -> None:
        self.skipped = self.spikes = 0
        self.on_trouble: Callable[[str], None] = lambda sentence: None
        self._config, self._ranks = config, ranks
        self._in_a_row = 0
        self._phase = ""
        self._losses: deque[float] = deque(maxlen=config.loss_spike_window)

    def approve(self, step: int, phase: str, loss: float, grad_norm: float) -> bool:
        """Whether the optimizer may take this step; the same answer on every rank. Collective.

        Args:
            step: its number, from 1.
            phase: the objective's name; losses are compared within one.
            loss: of the global batch.
            grad_norm: of the whole gradient.

        Raises:
            Diverged: so many steps in a row were not approved.
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
                f"{what}; {self._in_a_row} steps in a row had to be skipped (--max-skipped-iterations-in-a-row); go on "
                "from an older checkpoint with a lower --lr, or look at what these steps read (--log-sample-ids)"
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
            return f"loss {loss:.4g} or gradient norm {grad_norm:.4g} is no number on some rank"
        last = f"the median of the last {len(self._losses)} is {median(self._losses or [math.nan]):.4g}"
        return f"loss {loss:.4g} is a spike, {last}"

    def log_values(self) -> dict[str, int]:
        """What stands in every line of the log."""
        return {"skipped_iterations": self.skipped, "loss_spikes": self.spikes}

    def state_dict(self) -> dict[str, Any]:
        """All that a restart must know, as JSON can hold it."""
        return {
            "skipped": self.skipped,
            "spikes": self.spikes,
            "in_a_row": self._in_a_row,
            "phase": self._phase,
            "losses": list(self._losses),
        }

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Go on from :meth:`state_dict`; of a longer window the last losses are kept."""
        self.skipped, self.spikes, self._in_a_row = state["skipped"], state["spikes"], state["in_a_row"]
        self._phase = state["phase"]
        self._losses = deque(state["losses"], maxlen=self._config.loss_spike_window)
