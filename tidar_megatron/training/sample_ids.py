"""The log of what each step really trained on (``--log-sample-ids``): proof that nothing is repeated and nothing lost.

``sample_ids/dp-0003.jsonl`` in the run's folder is the fourth data-parallel rank's: an object a line and step, with
``iteration`` and ``ids``, for each row [source, the source's epoch, number of the packed sequence in it].
"""

from collections.abc import Sequence
from pathlib import Path

from tidar_megatron.training.metrics import JsonLines

FOLDER = "sample_ids"


class SampleIds:
    """One data-parallel rank's part of the log; a line is on its way to the disk when :meth:`write` returns.

    Args:
        run: the run's folder, its log :func:`cut`.
        dp_rank: whose.
    """

    def __init__(self, run: str | Path, dp_rank: int) -> None:
        path = Path(run) / FOLDER / f"dp-{dp_rank:04d}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lines = JsonLines(path)

    def write(self, iteration: int, ids: Sequence[tuple[int, int, int]]) -> None:
        """The samples of the step that made ``iteration``."""
        self._lines.write(iteration, {"ids": ids})

    def close(self) -> None:
        """Flush."""
        self._lines.close()


def cut(run: str | Path, iteration: int) -> None:
    """Forget the steps after ``iteration``, which happen again, of all ranks of the run as it was: one rank's task."""
    for path in sorted((Path(run) / FOLDER).glob("dp-*.jsonl")):
        JsonLines(path, iteration).close()
