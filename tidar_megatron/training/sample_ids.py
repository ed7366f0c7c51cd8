"""Log the samples that each step trained on (``--log-sample-ids``), to prove that none is repeated or lost.

``sample_ids/dp-0003.jsonl`` in the run's folder belongs to the fourth data-parallel rank. It has one JSON object per
step, with ``iteration`` and ``ids``; each id is [source, epoch of the source, number of the packed sequence in it].
"""

from collections.abc import Sequence
from pathlib import Path

from tidar_megatron.training.metrics import JsonLines

FOLDER = "sample_ids"


class SampleIds:
    """The log of one data-parallel rank; each line is flushed to the operating system when :meth:`write` returns.

    Args:
        run: The run's folder; :func:`cut` must have truncated its log.
        dp_rank: The data-parallel rank.
    """

    def __init__(self, run: str | Path, dp_rank: int) -> None:
        path = Path(run) / FOLDER / f"dp-{dp_rank:04d}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lines = JsonLines(path)

    def write(self, iteration: int, ids: Sequence[tuple[int, int, int]]) -> None:
        """Log the ids of the samples that step ``iteration`` trained on."""
        self._lines.write(iteration, {"ids": ids})

    def close(self) -> None:
        """Flush and close the log."""
        self._lines.close()


def cut(run: str | Path, iteration: int) -> None:
    """Remove the steps after ``iteration``, which will be repeated, from the logs of all ranks; call it on one rank."""
    for path in sorted((Path(run) / FOLDER).glob("dp-*.jsonl")):
        JsonLines(path, iteration).close()
