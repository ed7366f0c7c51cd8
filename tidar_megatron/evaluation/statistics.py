"""Tests of hypotheses."""

from collections.abc import Sequence

import torch


def chi_square(counts: Sequence[int], probabilities: Sequence[float]) -> float:
    """The p-value of Pearson's test that ``counts`` were drawn with ``probabilities``.

    Cells that expect less than 5 are taken together, with the next larger where they make up less than 5 all the same.
    What cannot be and was drawn gives 0.
    """
    seen = torch.tensor(counts, dtype=torch.float64)
    expected = torch.tensor(probabilities, dtype=torch.float64) * seen.sum()
    possible = expected > 0
    if seen[~possible].sum() > 0:
        return 0.0
    expected, order = expected[possible].sort()
    seen = seen[possible][order]
    together = int((expected < 5).sum())
    while together < len(expected) and 0 < expected[:together].sum() < 5:
        together += 1
    cells = [(seen[:together].sum(), expected[:together].sum())] if together else []
    cells = [*cells, *zip(seen[together:], expected[together:], strict=True)]
    if len(cells) < 2:
        return 1.0  # nothing to tell apart
    statistic = torch.stack([(count - wanted) ** 2 / wanted for count, wanted in cells]).sum()
    freedom = torch.tensor(len(cells) - 1, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom / 2, statistic / 2))
