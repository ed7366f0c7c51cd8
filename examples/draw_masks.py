"""Draw who may attend to whom, in training and in one decode step, from the package's own rule.

python examples/draw_masks.py examples/masks.png
"""

import sys

import matplotlib

matplotlib.use("Agg")
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap

from tidar_megatron.attention_mask import decode_layout, may_attend, prefix_layout, training_layout

HIDDEN, ON_CLEAN, ON_MASKS = 0, 1, 2
COLOURS = ListedColormap(["#f4f4f2", "#3b6ea8", "#e0883a"])


def draw(axis: Axes, queries: torch.Tensor, keys: torch.Tensor, title: str, names: tuple[list[str], list[str]]) -> None:
    """Draw one mask: blue where a query sees a clean token, orange where a mask token sees a mask token.

    Args:
        axis: the axes to draw on.
        queries: metadata of the rows, int32 ``[q, 4]``.
        keys: metadata of the columns, int32 ``[k, 4]``.
        title: the title of the axes.
        names: the labels of the rows and of the columns.
    """
    seen = may_attend(queries, keys).int()
    seen[:, keys[:, 3] >= 0] *= ON_MASKS
    axis.imshow(seen, cmap=COLOURS, vmin=HIDDEN, vmax=ON_MASKS)
    axis.set_xticks(range(len(keys)), names[1], rotation=90, fontsize=7)
    axis.set_yticks(range(len(queries)), names[0], fontsize=7)
    axis.set_xticks([x - 0.5 for x in range(len(keys))], minor=True)
    axis.set_yticks([y - 0.5 for y in range(len(queries))], minor=True)
    axis.grid(which="minor", color="white", linewidth=1)
    axis.tick_params(length=0, which="both")
    axis.set_title(title, fontsize=11)


def main(path: str) -> None:
    """Write the figure of both masks to ``path``.

    The training mask has S = 12, B = 4 and documents of 8 and 4 tokens. The decode mask has K = 3 drafts after a prefix
    of 4 tokens, with all branches.
    """
    document = torch.tensor([0] * 8 + [1] * 4)
    index = torch.tensor([*range(8), *range(4)])
    training = training_layout(document, index, block_size=4)
    labels = [f"{'ab'[d]}{i}" for d, i in zip(document.tolist(), index.tolist(), strict=True)] + ["m"] * 12

    prefix, drafts, branches = 4, 3, (1, 2, 3)
    step = decode_layout(prefix, drafts, branches, draft_length=3)
    committed = [f"x{i}" for i in range(prefix)]
    rows = [f"d{i}" for i in range(drafts)] + [f"m{r}.{i}" for r in branches for i in range(3)]

    fig, (left, right) = plt.subplots(1, 2, figsize=(12, 5.8))
    draw(
        left,
        training,
        training,
        "training: documents a and b, clean half then mask half, blocks of 4",
        (labels, labels),
    )
    keys = torch.cat([prefix_layout(prefix), step])
    draw(
        right,
        step,
        keys,
        "decoding: 4 cached tokens x, 3 drafts d, a branch of masks per outcome",
        (rows, committed + rows),
    )
    for axis, edge_x, edge_y in ((left, 12, 12), (right, prefix, drafts)):
        axis.axvline(edge_x - 0.5, color="black", linewidth=1)
        axis.axhline(edge_y - 0.5, color="black", linewidth=1)
    fig.supxlabel(
        "a row (query) may attend to the coloured columns (keys): blue clean tokens, orange mask tokens", fontsize=10
    )
    fig.tight_layout()
    fig.savefig(path, dpi=100)


if __name__ == "__main__":
    main(sys.argv[1])
