"""Neither figures nor training depend on how far the vocabulary is padded, in any layout."""

import pytest
import torch
from safetensors.torch import load_file

from tests.models.padded_vocabulary import CASES, MULTIPLES, measure
from tests.ranks import run_ranks
from tests.training.small_runs import small
from tidar_megatron.distributed.fake import play_rank
from tidar_megatron.distributed.groups import shut_down
from tidar_megatron.huggingface.convert import export_run
from tidar_megatron.models.gpt import build_model, padded_vocab_size
from tidar_megatron.models.parameters import VOCABULARY, kind_of
from tidar_megatron.planning.sizes import Sizes
from tidar_megatron.training.layout_variants import MASK_TOKEN_ID, variant_config
from tidar_megatron.training.trainer import Trainer

IDS = MASK_TOKEN_ID + 1
THREE = {"num_attention_heads": 6, "num_query_groups": 3, "hidden_size": 48, "make_vocab_size_divisible_by": 128}
TOLERANCE = 1e-6  # of a loss or a metric, absolute; of a gradient, relative to the gradient of all parameters


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """{(layout, untied, multiple): what each rank measured}; one launch of two ranks for all but one rank's own."""
    folder = tmp_path_factory.mktemp("padded")
    run_ranks(2, "-m", "tests.models.padded_vocabulary", folder)
    ranks = [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]
    found = {case: [rank[case] for rank in ranks] for case in ranks[0]}
    for untied in (False, True):
        for multiple in MULTIPLES:
            found["one", untied, multiple] = [measure("one", multiple, untied)]
    shut_down()
    return found


def whole(ranks, key):
    """{parameter: the whole tensor} of what tensor-parallel or pipeline ranks have, vocabularies with their padding."""
    joined = {}
    for name in {name for rank in ranks for name in rank[key]}:
        kind, _ = kind_of(name)
        parts = {rank["tp_rank"]: rank[key][name] for rank in ranks if name in rank[key]}
        parts = [parts[rank] for rank in sorted(parts)]
        if kind.shard == "replicated" or len(parts) == 1:
            joined[name] = parts[0]
        elif kind.fused == "glu":
            joined[name] = torch.cat([part.chunk(2)[half] for half in (0, 1) for part in parts])
        else:
            joined[name] = torch.cat(parts, dim=0 if kind.shard == "rows" else 1)
    return joined


@pytest.mark.process
@pytest.mark.parametrize(("layout", "untied"), [("one", False), ("one", True), *CASES])
def test_figures_and_gradients_do_not_depend_on_the_padding(results, layout, untied):
    (one,) = results["one", untied, MULTIPLES[0]]
    for multiple in MULTIPLES:
        ranks, largest = results[layout, untied, multiple], TOLERANCE * one["grad_norm"]
        for rank in ranks:
            assert rank["losses"] == pytest.approx(one["losses"], abs=TOLERANCE)
            assert rank["evaluation"].keys() == one["evaluation"].keys()
            for name, value in rank["evaluation"].items():
                assert value == pytest.approx(one["evaluation"][name], abs=TOLERANCE), name
            assert rank["later"] == pytest.approx(one["later"], rel=1e-5)  # Adam's first steps magnify rounding
        for name, grad in whole(ranks, "grads").items():
            ids = IDS if name in VOCABULARY else len(grad)
            assert (grad[:ids].double() - one["grads"][name][:ids].double()).norm() <= largest, name
            assert not grad[ids:].any(), name
        for name, rows in whole(ranks, "rows").items():
            assert len(rows) % multiple == 0
            assert not rows[IDS:].any(), name  # zeros when the run starts, and after two steps


def test_two_ranks_hold_padding_in_part_and_alone():
    """What the cases above are for: the second of two ranks has 48, 33 and no ids."""
    assert [max(IDS - -(-IDS // m) * m // 2, 0) for m in MULTIPLES] == [48, 33, 0]


@pytest.mark.slow
@pytest.mark.parametrize("distributed", [False, True])
def test_a_checkpoint_goes_on_under_more_padding_and_under_less(shards, tmp_path, distributed):
    """As one of another TP may have: weights, Adam's state, and an export of a checkpoint with other padding."""
    save = str(tmp_path / "run")
    other = {"override_fingerprint": ["make_vocab_size_divisible_by"]}

    def go_on(multiple, steps, **checkpoint):
        model = {"make_vocab_size_divisible_by": multiple, "untie_embeddings_and_output_weights": True}
        parallel = {"use_distributed_optimizer": distributed}
        trainer = Trainer.build(small(shards, model=model, parallel=parallel, checkpoint={"save": save, **checkpoint}))
        figures = [trainer.step() for _ in range(steps)]
        trainer.write_run_folder()
        trainer.save()
        trainer.close()
        shut_down()
        return [figure[key] for figure in figures for key in ("ar_loss", "grad_norm")]

    whole = go_on(8, 6, save=str(tmp_path / "whole"))
    parts = go_on(8, 2) + go_on(4096, 2, load=save, **other) + go_on(2, 2, load=save, **other)
    assert parts == pytest.approx(whole, rel=1e-4)
    export_run(tmp_path / "whole", tmp_path / "hf")
    for iteration in (2, 4, 6):  # of which the run's configuration is that of the last
        export_run(save, tmp_path / str(iteration), iteration)
    ours, wanted = (load_file(tmp_path / name / "model.safetensors") for name in ("6", "hf"))
    assert ours.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=1e-4)
    assert len(load_file(tmp_path / "4" / "model.safetensors")["lm_head.weight"]) == 258


def test_three_ranks_share_any_vocabulary():
    """TP 3 does not divide the default multiple, 128, so its padding is larger."""
    config = variant_config("packed", 3, {"tensor_model_parallel_size": 3}, THREE)
    with play_rank(config.parallel, 1, 3) as ranks:
        (model,) = build_model(config, IDS, ranks)
    assert model.embedding.word_embeddings.weight.shape[0] == Sizes(config, 3).vocabulary == 128
    assert padded_vocab_size(130, config) == 384
