"""Statistical hypothesis tests."""

from collections.abc import Sequence

import torch


def chi_square(counts: Sequence[int], probabilities: Sequence[float]) -> float:
    """Return the p-value of Pearson's chi-square test that ``counts`` were drawn with ``probabilities``.

    Cells with an expected count below 5 are pooled, together with the next larger cells until the pool reaches 5. The
    p-value is 0 if a cell of probability 0 has a count.
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
