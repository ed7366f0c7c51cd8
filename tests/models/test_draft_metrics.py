"""Draft acceptance against its definition, one token at a time, on one and on several vocabulary-parallel ranks."""

import pytest
import torch

from tidar_megatron.data.loader import SequenceSettings, TrainingData
from tidar_megatron.models.draft_metrics import EvaluationSums, evaluation_sums

LENGTH, VOCAB = 24, 258


@pytest.mark.parametrize(("block", "size", "padded"), [(1, 1, 258), (2, 1, 264), (4, 2, 264), (8, 3, 768)])
def test_equals_the_definition(shards, ranks, block, size, padded):
    """The padding of the vocabulary would always be the best id; of three ranks the last holds nothing else."""
    data = TrainingData(shards[0], SequenceSettings(LENGTH, block, VOCAB - 1, seed=0))
    batches = data.step_batches(0, 6, 3, 0, 1)
    draw = torch.Generator().manual_seed(block)
    total = EvaluationSums.zeros(block, torch.device("cpu")).values
    losses, accepted, agreed, tokens, greedy = {"ar": [], "diffusion": []}, {}, {}, [], []
    for batch in batches:
        logits = 3 * torch.randn(3, 2 * LENGTH, VOCAB, generator=draw)
        states = torch.nn.functional.pad(logits, (0, 1), value=100.0).transpose(0, 1)
        weight = torch.zeros(padded, VOCAB + 1)
        weight[:VOCAB, :VOCAB], weight[VOCAB:, VOCAB] = torch.eye(VOCAB), 1.0

        def measure(group, states=states, weight=weight, batch=batch):
            own = weight.chunk(size)[group.rank()]
            return evaluation_sums(states, own, batch, block, group, VOCAB, chunk=10).values

        first, *others = ranks(size, measure)
        assert all(torch.equal(first, other) for other in others)
        total = total + first
        p = logits.double().softmax(-1)
        for row in range(3):
            for i in range(2 * LENGTH):
                if batch.supervised[row, i]:
                    kind = "ar" if i < LENGTH else "diffusion"
                    losses[kind].append(-p[row, i, batch.labels[row, i]].log().item())
            for start in range(0, LENGTH, block):
                expected, run, wanted, still = 1.0, 1.0, 1.0, 1.0
                for k in range(1, block):
                    if batch.supervised[row, LENGTH + start + k]:
                        p_ar, q = p[row, start + k - 1], p[row, LENGTH + start + k]
                        a, same = torch.minimum(p_ar, q).sum().item(), float(p_ar.argmax() == q.argmax())
                        accepted.setdefault(k, []).append(a)
                        agreed.setdefault(k, []).append(same)
                        run, still = run * a, still * same
                        expected, wanted = expected + run, wanted + still
                if batch.supervised[row, LENGTH + start : LENGTH + start + block].all():
                    tokens.append(expected)
                    greedy.append(wanted)
    mean = lambda values: sum(values) / len(values)  # noqa: E731
    ours = EvaluationSums(total).means()
    assert ours["ar_loss"] == pytest.approx(mean(losses["ar"]), rel=1e-5)
    assert ours["diffusion_loss"] == pytest.approx(mean(losses["diffusion"]), rel=1e-5)
    assert ours["tokens_per_forward"] == pytest.approx(mean(tokens), rel=1e-5)
    assert ours["greedy_tokens_per_forward"] == pytest.approx(mean(greedy), rel=1e-5)
    assert ours["acceptance_by_offset"] == pytest.approx([mean(accepted[k]) for k in range(1, block)], rel=1e-5)
    assert ours["agreement_by_offset"] == pytest.approx([mean(agreed[k]) for k in range(1, block)], rel=1e-5)
