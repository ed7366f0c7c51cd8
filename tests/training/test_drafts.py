"""Draft weights on a frozen model: gradients of an independent dense model, in every layout; the base stays.

Once with aligned blocks and the data's tokens, once with everything else: blocks that start anywhere, more masks than
clean tokens, the model's own distribution, and the selector.
"""

import functools
import json

import pytest
import torch

from tests import reference
from tests.layouts import run_layout
from tests.random_models import write_random_model
from tests.ranks import run_ranks
from tests.training.test_parity import close, gather
from tidar_megatron.attention_mask import DOCUMENT, INDEX
from tidar_megatron.config import build_config
from tidar_megatron.data.blocks import choose_starts
from tidar_megatron.data.loader import SequenceSettings, TrainingData
from tidar_megatron.distributed.groups import shut_down
from tidar_megatron.huggingface.origin import open_origin
from tidar_megatron.models.parameters import is_draft_weight
from tidar_megatron.training.resolve import resolve

pytestmark = pytest.mark.process

SEQUENCES, MICRO, BLOCK, LENGTH, RANK, ALPHA = 8, 2, 4, 32, 6, 12.0
BLOCKS = 12  # that start anywhere
VARIANTS = {
    "aligned": {"drafts": {"draft_loss": "ce", "draft_loss_weighting": "none", "draft_selector": 0}},
    "anywhere": {
        "tidar": {"block_starts": "anywhere", "blocks_per_sequence": BLOCKS},
        "drafts": {"draft_loss": "ce", "draft_loss_weighting": "none", "draft_selector": 0},
    },
    "learned": {
        "tidar": {"block_starts": "anywhere", "blocks_per_sequence": BLOCKS},
        "drafts": {"draft_loss": "hybrid", "draft_loss_weighting": "reach", "draft_selector": 3},
    },
}
PARALLEL = ["tp2sp", "pp2vpp2", "cp2"]


@pytest.fixture(scope="module")
def run_variant(shards, tmp_path_factory):
    """variant -> the setup and {layout: results of its ranks}."""

    @functools.cache
    def run(variant):
        folder = tmp_path_factory.mktemp(variant)
        write_random_model(folder / "hf", kind="qwen3", tie=variant != "learned")
        changes = VARIANTS[variant]
        setup = {
            "tidar": {"block_size": BLOCK, "attention_chunk_size": 8, **changes.get("tidar", {})},
            "drafts": {"train": "drafts", "draft_rank": RANK, "draft_alpha": ALPHA, **changes["drafts"]},
            "model": {"make_vocab_size_divisible_by": 8},
            "data": {"train_data": str(shards[0]), "valid_data": str(shards[1]), "seq_length": LENGTH},
            "training": {
                "global_batch_size": SEQUENCES,
                "micro_batch_size": MICRO,
                "init_from": str(folder / "hf"),
                "eval_sequences": 9,
            },
            "optimizer": {"lr": 1e-3, "lr_decay_style": "constant", "clip_grad": 0.5},
        }
        (folder / "setup.json").write_text(json.dumps(setup))
        results = {"one": [run_layout(setup, "one", folder)]}
        shut_down()
        if variant != "anywhere":  # its gradients alone are compared
            run_ranks(2, "-m", "tests.layouts", folder / "setup.json", folder, *PARALLEL)
            results |= {name: [torch.load(folder / f"{name}-{rank}.pt") for rank in (0, 1)] for name in PARALLEL}
        return setup, results

    return run


def plain(setup, weights):
    """The loss and the gradients of the reference over the global batch, in float64."""
    source, tokenizer, origin = setup["data"]["train_data"], *_origin(setup)
    config = resolve(build_config(setup), tokenizer, origin)
    anywhere = config.tidar.block_starts == "anywhere"
    settings = SequenceSettings(
        LENGTH,
        BLOCK,
        config.mask_token_id,
        seed=1234,
        chosen_blocks=config.chosen_blocks,
        starts_anywhere=anywhere,
    )
    (batch,) = TrainingData(source, settings).step_batches(0, SEQUENCES, SEQUENCES, 0, 1)
    batch.tokens[:, LENGTH:] = 0  # the masks have an input of their own
    masks, labels, supervised = [], [], []
    positions = torch.arange(LENGTH).repeat(2)
    for number, row in enumerate(batch.visibility[:, :LENGTH]):
        document, index = row[:, DOCUMENT].tolist(), row[:, INDEX].tolist()
        if not anywhere:
            masks.append(reference.training_mask(document, index, BLOCK))
            labels.append(batch.labels[number, LENGTH:].tolist())
            supervised.append(batch.supervised[number, LENGTH:].tolist())
            continue
        starts = choose_starts(LENGTH, BLOCKS, 1234, number).tolist()
        masks.append(reference.anywhere_mask(document, index, starts, BLOCK))
        places = [start + offset for start in starts for offset in range(BLOCK)]
        first = [start for start in starts for _ in range(BLOCK)]
        text = [not fill for fill in batch.padding[number, :LENGTH].tolist()]
        known = [p < LENGTH and document[p] == document[f] and text[p] for p, f in zip(places, first, strict=True)]
        supervised.append(known)
        labels.append([int(batch.tokens[number, p]) if ok else 0 for p, ok in zip(places, known, strict=True)])
    leaves = {name: weight.double().requires_grad_() for name, weight in weights.items()}
    labels = torch.cat([batch.labels[:, :LENGTH], torch.tensor(labels)], dim=1)
    total, supervised = 0.0, torch.tensor(supervised)
    for number in range(SEQUENCES):
        if anywhere:
            starts = choose_starts(LENGTH, BLOCKS, 1234, number).tolist()
            places = [start + offset for start in starts for offset in range(BLOCK)]
            positions = torch.cat([torch.arange(LENGTH), torch.tensor(places)])
        rows = slice(number, number + 1)
        shown = leaves, config.model, batch.tokens[rows], labels[rows], masks[number][None], positions
        losses = reference.token_losses(*shown, clean=LENGTH, scale=ALPHA / RANK)[0, LENGTH:]
        total = total + losses[supervised[number]].sum()
    loss = total / supervised.sum()
    loss.backward()
    return loss.item(), {name: leaf.grad for name, leaf in leaves.items()}


def _origin(setup):
    data = TrainingData(setup["data"]["train_data"], SequenceSettings(LENGTH, BLOCK, 260, seed=1234))
    return data.sources[0].tokenizer, open_origin(setup["training"]["init_from"])


@pytest.mark.parametrize("variant", ["aligned", "anywhere"])
def test_gradients_equal_the_independent_model(run_variant, variant):
    """Of both weights of every pair and of the mask token's row; to 1e-5."""
    setup, results = run_variant(variant)
    (one,) = results["one"]
    loss, grads = plain(setup, one["weights"])
    assert one["first_losses"][1] == pytest.approx(loss, rel=1e-5)
    assert len(one["grads"]) == 1 + 4 * 4 * 2 and all(is_draft_weight(name) for name in one["grads"])
    for name, grad in one["grads"].items():
        assert grads[name].norm() > 1e-6, name
        close(grad, grads[name])


@pytest.mark.parametrize("layout", PARALLEL)
@pytest.mark.parametrize("variant", ["aligned", "learned"])
def test_a_layout_equals_one_rank(run_variant, variant, layout):
    _, results = run_variant(variant)
    (one,) = results["one"]
    for rank in results[layout]:
        assert [loss for _, loss in rank["losses"]] == pytest.approx([loss for _, loss in one["losses"]], abs=5e-6)
        assert rank["grad_norms"] == pytest.approx(one["grad_norms"], rel=1e-5)
        for name, value in rank["evaluation"].items():
            assert value == pytest.approx(one["evaluation"][name], abs=2e-5), name
    whole = gather(results[layout], "grads")
    assert whole.keys() == one["grads"].keys()
    for name, grad in whole.items():
        assert grad.norm() > 1e-6, name
        close(grad, one["grads"][name])
