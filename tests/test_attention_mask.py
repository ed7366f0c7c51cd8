"""The attention rule against the tables of the method, transcribed position by position in plain Python."""

from random import Random

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tidar_megatron.attention_mask import decode_layout, may_attend, prefix_layout, training_layout

SETTINGS = settings(deadline=None)


def training_table(document: list[int], index: list[int], block_size: int) -> list[list[bool]]:
    """Who sees whom in the doubled sequence: "clean token at p: clean tokens at positions <= p, no mask token; mask
    token at p, block b: clean tokens before the block, every mask token of the block", within a document."""
    length = len(document)
    rows = []
    for q in range(2 * length):
        row = []
        for k in range(2 * length):
            q_document, k_document = document[q % length], document[k % length]
            p, other = index[q % length], index[k % length]
            b = p // block_size
            if q < length and k < length:
                sees = other <= p
            elif q < length:
                sees = False
            elif k < length:
                sees = other < b * block_size
            else:
                sees = b * block_size <= other < (b + 1) * block_size
            row.append(sees and q_document == k_document)
        rows.append(row)
    return rows


def decode_table(
    prefix: int, drafts: int, branches: list[int], draft_length: int
) -> tuple[list[list[bool]], list[list[bool]], list[int]]:
    """Queries x prefix, queries x queries, position of each query, for one draft/verify forward."""
    tokens = [("draft", i, prefix + i) for i in range(drafts)]
    for r in branches:
        tokens += [("branch", r, prefix + r + i) for i in range(draft_length)]
    to_prefix = [[True] * prefix for _ in tokens]  # drafts and branches alike see the whole prefix
    among = []
    for kind, number, _ in tokens:
        row = []
        for other_kind, other_number, _ in tokens:
            if kind == "draft":  # causally each other, never a mask token
                row.append(other_kind == "draft" and other_number <= number)
            elif other_kind == "draft":  # branch r: the first r drafts
                row.append(other_number < number)
            else:  # itself, both directions; no other branch
                row.append(other_number == number)
        among.append(row)
    return to_prefix, among, [position for _, _, position in tokens]


@st.composite
def rows(draw: st.DrawFn) -> tuple[list[int], list[int], int]:
    """A row of documents filled up to the block size, the first perhaps continued from an earlier window, and the row
    perhaps cut anywhere (so S need not be a multiple of B)."""
    block_size = draw(st.integers(1, 6))
    document, index = [], []
    for number in range(draw(st.integers(1, 4))):
        length = -(-draw(st.integers(1, 11)) // block_size) * block_size  # fill included
        first = draw(st.integers(0, 3)) * block_size if number == 0 else 0
        document += [number] * length
        index += range(first, first + length)
    cut = draw(st.integers(1, len(document)))
    return document[:cut], index[:cut], block_size


@SETTINGS
@given(rows())
def test_training_layout_is_the_table(row: tuple[list[int], list[int], int]) -> None:
    document, index, block_size = row
    layout = training_layout(torch.tensor(document), torch.tensor(index), block_size)
    assert layout.dtype == torch.int32
    assert may_attend(layout, layout).tolist() == training_table(document, index, block_size)


@SETTINGS
@given(rows(), st.randoms(use_true_random=False))
def test_the_rule_commutes_with_any_permutation(row: tuple[list[int], list[int], int], random: Random) -> None:
    document, index, block_size = row
    layout = training_layout(torch.tensor(document), torch.tensor(index), block_size)
    order = list(range(len(layout)))
    random.shuffle(order)
    assert torch.equal(may_attend(layout[order], layout[order]), may_attend(layout, layout)[order][:, order])


def test_batches_broadcast() -> None:
    index = torch.arange(8)
    layouts = torch.stack([training_layout(index * 0, index, 4), training_layout(index // 4, index % 4, 4)])
    assert torch.equal(may_attend(layouts, layouts), torch.stack([may_attend(one, one) for one in layouts]))


@SETTINGS
@given(st.data())
def test_decode_layout_is_the_table(data: st.DataObject) -> None:
    prefix, drafts = data.draw(st.integers(0, 9)), data.draw(st.integers(1, 6))
    draft_length = data.draw(st.integers(1, 6))
    branches = data.draw(st.lists(st.integers(1, drafts), unique=True))
    check_decode(prefix, drafts, branches, draft_length)


@SETTINGS
@given(prompt=st.integers(1, 12), draft_length=st.integers(1, 8))
def test_prefill_is_a_decode_layout(prompt: int, draft_length: int) -> None:
    layout = check_decode(0, prompt, [prompt], draft_length)
    # "The prompt causally, plus K masks after it that see the prompt and each other."
    seen = may_attend(layout, layout)
    assert torch.equal(seen[:prompt, :prompt], torch.ones(prompt, prompt).tril().bool())
    assert seen[prompt:].all()
    assert not seen[:prompt, prompt:].any()


@SETTINGS
@given(prefix=st.integers(0, 12))
def test_a_plain_step_sees_the_prefix_and_itself(prefix: int) -> None:
    check_decode(prefix, 1, [], 4)


def check_decode(prefix: int, drafts: int, branches: list[int], draft_length: int) -> torch.Tensor:
    layout = decode_layout(prefix, drafts, branches, draft_length)
    to_prefix, among, positions = decode_table(prefix, drafts, branches, draft_length)
    assert may_attend(layout, prefix_layout(prefix)).tolist() == to_prefix
    assert may_attend(layout, layout).tolist() == among
    assert layout[:, 1].tolist() == positions
    # The committed tokens themselves are plain causal, and none of them sees a draft.
    committed = prefix_layout(prefix)
    assert may_attend(committed, committed).tolist() == [[k <= q for k in range(prefix)] for q in range(prefix)]
    assert not may_attend(committed, layout).any()
    return layout


def test_a_branch_sees_what_the_training_mask_showed() -> None:
    """Draft/verify of a whole block is the training mask's view: a branch after r drafts equals the mask block of a
    doubled sequence whose block starts there."""
    prefix, draft_length = 8, 4
    index = torch.arange(prefix + draft_length)
    doubled = training_layout(index * 0, index, draft_length)
    last_block = doubled[-draft_length:]
    seen_in_training = may_attend(last_block, doubled[: prefix + draft_length])[:, :prefix]
    branch = decode_layout(prefix - 2, 2, [2], draft_length)[2:]
    keys = torch.cat([prefix_layout(prefix - 2), decode_layout(prefix - 2, 2, [2], draft_length)[:2]])
    assert torch.equal(branch[:, :3], last_block[:, :3])  # same document, places, horizon
    assert torch.equal(may_attend(branch, keys), seen_in_training)
