"""The megatron-core model equals an independent one; every layout equals one rank.

The batches are packed documents with fill, and their supervised counts differ between micro-batches and ranks.
"""

import functools
import json

import pytest
import torch
from safetensors.torch import load_file

from tests import reference
from tests.conftest import THOROUGH
from tests.layouts import LAYOUTS, run_layout
from tests.random_models import write_random_model
from tests.ranks import run_ranks
from tidar_megatron.attention_mask import DOCUMENT, INDEX
from tidar_megatron.config import build_config
from tidar_megatron.data.loader import SequenceSettings, TrainingData
from tidar_megatron.distributed.groups import shut_down
from tidar_megatron.huggingface.convert import export_run
from tidar_megatron.huggingface.origin import open_origin
from tidar_megatron.models.parameters import VOCABULARY, kind_of
from tidar_megatron.training.resolve import resolve
from tidar_megatron.training.trainer import Trainer

pytestmark = pytest.mark.process

SEQUENCES, MICRO, ALPHA, BLOCK, LENGTH = 8, 2, 0.8, 4, 32
LAYOUT_SETUP = {
    "num_layers": 2,
    "hidden_size": 64,
    "ffn_hidden_size": 96,
    "num_attention_heads": 4,
    "num_query_groups": 2,
}
SHAPE = {"num_layers": 4, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 4}
FAMILIES = {  # GQA in all of them
    "qwen3-tied": {"kind": "qwen3", "tie": True},
    "llama-untied": {"kind": "llama", "tie": False},
    "qwen2-tied": {"kind": "qwen2", "tie": True},
}
PARALLEL = [name for name in LAYOUTS if name not in ("one", "ep2")]
# the quick profile: most ways to divide the work, with one family; test_layout_check.py and test_own_parts.py have more
QUICK = {
    "qwen3-tied": ["dp2", "tp2", "pp2vpp2", "dp2sharded"],
    "llama-untied": [],
    "qwen2-tied": ["tp2sp"],
}
RUN = {family: PARALLEL if THOROUGH else QUICK[family] for family in FAMILIES}


def layouts(*wanted):
    """Parametrise with the families and those of the ``wanted`` layouts that run with each."""
    cases = [(family, layout) for family in FAMILIES for layout in wanted if layout in ["one", *RUN[family]]]
    return pytest.mark.parametrize(("runs", "layout"), cases, indirect=["runs"])


@pytest.fixture(scope="module")
def run_family(shards, tmp_path_factory):
    """family -> setup, {layout: results of its ranks}, folder; one launch for all layouts of a family."""

    @functools.cache
    def run(family):
        folder = tmp_path_factory.mktemp(family)
        write_random_model(folder / "hf", **FAMILIES[family])
        setup = {
            "tidar": {"block_size": BLOCK, "ar_loss_weight": ALPHA, "attention_chunk_size": 8},
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
        parallel = RUN[family]
        if parallel:
            run_ranks(2, "-m", "tests.layouts", folder / "setup.json", folder, *parallel)
        results = {name: [torch.load(folder / f"{name}-{rank}.pt") for rank in (0, 1)] for name in parallel}
        results["one"] = [run_layout(setup, "one", folder)]
        shut_down()
        return setup, results, folder

    return run


@pytest.fixture
def runs(run_family, request):
    return run_family(request.param)


def plain(setup, weights):
    """Token losses, loss and gradients of the reference over the global batch, in float64 as in float32."""
    data = TrainingData(setup["data"]["train_data"], SequenceSettings(LENGTH, BLOCK, 260, seed=1234))
    config = resolve(build_config(setup), data.sources[0].tokenizer, open_origin(setup["training"]["init_from"]))
    (batch,) = data.step_batches(0, SEQUENCES, SEQUENCES, 0, 1)
    assert config.tidar.mask_token_id == 257
    batch.tokens[:, LENGTH:] = 257
    clean = batch.visibility[:, :LENGTH]
    mask = torch.stack(
        [reference.training_mask(row[:, DOCUMENT].tolist(), row[:, INDEX].tolist(), BLOCK) for row in clean]
    )
    leaves = {name: weight.double().requires_grad_() for name, weight in weights.items()}
    positions = torch.arange(LENGTH).repeat(2)
    losses = reference.token_losses(leaves, config.model, batch.tokens, batch.labels, mask, positions)
    loss = reference.joint_loss(losses, batch.supervised, ALPHA)
    loss.backward()
    return batch, losses.detach(), loss.item(), {name: leaf.grad for name, leaf in leaves.items()}


def close(ours, theirs, tolerance=1e-5):
    """Relative error of the whole tensor, ||a - b|| / ||b||."""
    error = (ours.double() - theirs.double()).norm() / theirs.double().norm().clamp(min=1e-12)
    assert error <= tolerance, float(error)


def gather(ranks, key):
    """{parameter: the whole tensor} from the parts of tensor-parallel and pipeline ranks."""
    whole = {}
    for name in {name for rank in ranks for name in rank[key]}:
        kind, _ = kind_of(name)
        parts = {rank["tp_rank"]: rank[key][name] for rank in ranks if name in rank[key]}
        parts = [parts[rank] for rank in sorted(parts)]
        if kind.shard == "replicated" or len(parts) == 1:
            whole[name] = parts[0]
        elif kind.fused == "glu":
            halves = [part.chunk(2) for part in parts]
            whole[name] = torch.cat([half[n] for n in (0, 1) for half in halves])
        else:
            whole[name] = torch.cat(parts, dim=0 if kind.shard == "rows" else 1)
    return whole


@layouts("dp2")
def test_counts_differ_between_micro_batches_and_ranks(runs, layout):
    _, results, _ = runs
    counts = [rank["supervised"] for rank in results["dp2"]]
    assert len({count for rank in counts for count in rank}) > 1
    assert sum(c[0] for c in counts[0]) != sum(c[0] for c in counts[1])
    assert all(ar != diffusion for rank in counts for ar, diffusion in rank)


@layouts("one", "dp2")
def test_equals_the_independent_model(runs, layout):
    """Per-token losses and every gradient, to 1e-5 relative in float32."""
    setup, results, _ = runs
    batch, losses, loss, grads = plain(setup, results["one"][0]["weights"])
    for rank in results[layout]:
        for micro, ours in enumerate(rank["token_losses"]):
            first = (micro * len(results[layout]) + rank["dp_rank"]) * MICRO
            rows = slice(first, first + MICRO)
            seen = batch.supervised[rows]
            torch.testing.assert_close(ours[seen].double(), losses[rows][seen], rtol=1e-5, atol=1e-5)
        ar, diffusion = rank["first_losses"]
        assert (ALPHA * ar + diffusion) / (1 + ALPHA) == pytest.approx(loss, rel=1e-5)
        assert set(rank["grads"]) == set(grads)
        for name, grad in rank["grads"].items():
            close(grad, grads[name])


@layouts(*PARALLEL)
def test_equals_one_rank(runs, layout):
    """Losses of two optimizer steps to 5 decimals, gradient norms to 1e-5; gradients parameter by parameter."""
    _, results, _ = runs
    one, ranks = results["one"][0], results[layout]
    for rank in ranks:
        assert torch.tensor(rank["losses"]) == pytest.approx(torch.tensor(one["losses"]), abs=5e-6)
        assert rank["grad_norms"] == pytest.approx(one["grad_norms"], rel=1e-5)
        assert rank["evaluation"].keys() == one["evaluation"].keys()
        for name, value in rank["evaluation"].items():
            assert value == pytest.approx(one["evaluation"][name], abs=2e-5), name
    for name, grad in gather(ranks, "grads").items():
        close(grad, one["grads"][name])


@layouts("one", *PARALLEL)
def test_the_gradient_norm_is_float64s_and_waits_twice(runs, layout):
    """A parameter that tensor-parallel ranks duplicate counts once; no parameter costs a wait for the device."""
    _, results, _ = runs
    grads = gather(results[layout], "grads").values()
    norm = torch.cat([grad.double().flatten() for grad in grads]).norm().item()
    for rank in results[layout]:
        assert rank["norm"] == pytest.approx(norm, rel=1e-6)
        assert rank["waits"] == 2


@layouts("tp2", "pp2", "pp2vpp2", "cp2", "dp2sharded")
def test_checkpoint_of_a_layout_goes_on_in_one_rank(runs, layout):
    """The steps after the checkpoint, taken by one rank, give the losses that the layout itself gave.

    Several, because a wrong Adam state changes the weights with the first step, and losses from the second on.
    """
    setup, results, folder = runs
    parallel = {"use_distributed_optimizer": layout == "dp2sharded"}
    trainer = Trainer.build(build_config({**setup, "parallel": parallel, "checkpoint": {"load": str(folder / layout)}}))
    for theirs in results[layout][0]["next"]:
        ours = trainer.step()
        for key in ("ar_loss", "diffusion_loss", "grad_norm", "learning_rate"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-5), key
    shut_down()


@layouts("tp2", "pp2vpp2", "dp2sharded")
def test_export_knows_no_layout(runs, layout):
    """A tensor- or pipeline-parallel run exports the Hugging Face folder that one rank's run exports."""
    _, _, folder = runs
    for name in ("one", layout):
        if not (folder / f"{name}-hf").exists():
            export_run(folder / name, folder / f"{name}-hf")
            shut_down()
    ours, theirs = (load_file(folder / f"{name}-hf" / "model.safetensors") for name in (layout, "one"))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        close(ours[name], tensor, 1e-4)  # steps of Adam, whose first ones turn rounding into lr-sized steps


@pytest.fixture(scope="module")
def from_scratch(shards, tmp_path_factory):
    """{layout: results of its ranks} of a run that starts from random weights of our own."""
    folder = tmp_path_factory.mktemp("scratch")
    setup = {
        "tidar": {"block_size": BLOCK},
        "model": {**SHAPE, "untie_embeddings_and_output_weights": True},
        "data": {"train_data": str(shards[0]), "valid_data": str(shards[1]), "seq_length": LENGTH},
        "training": {"global_batch_size": SEQUENCES, "micro_batch_size": MICRO},
        "optimizer": {"lr": 1e-3},
    }
    (folder / "setup.json").write_text(json.dumps(setup))
    run_ranks(2, "-m", "tests.layouts", folder / "setup.json", folder, "tp2", "pp2")
    results = {name: [torch.load(folder / f"{name}-{rank}.pt") for rank in (0, 1)] for name in ("tp2", "pp2")}
    results["one"] = [run_layout(setup, "one", folder)]
    shut_down()
    return results


@pytest.mark.parametrize("layout", ["tp2", "pp2"])
def test_random_weights_do_not_depend_on_the_layout(from_scratch, layout):
    """The same weights bit for bit, so the same losses and gradient norms over two steps to 5 decimals."""
    one = from_scratch["one"][0]
    whole = gather(from_scratch[layout], "weights")
    assert whole.keys() == one["weights"].keys()
    first, second = (one["weights"][f"decoder.layers.{n}.self_attention.linear_proj.weight"] for n in (0, 1))
    assert not torch.equal(first, second)
    for name, weight in one["weights"].items():
        assert torch.equal(whole[name], weight), name
        if weight.dim() == 2:
            expected = 0.02 / (8**0.5 if name.endswith(("linear_proj.weight", "linear_fc2.weight")) else 1)
            drawn = weight[:258] if name in VOCABULARY else weight  # the rest is padding
            assert drawn.std().item() == pytest.approx(expected, rel=0.1)
    for rank in from_scratch[layout]:
        assert torch.tensor(rank["losses"]) == pytest.approx(torch.tensor(one["losses"]), abs=5e-6)
        assert rank["grad_norms"] == pytest.approx(one["grad_norms"], rel=1e-5)


@pytest.fixture(scope="module")
def expert_runs(shards, tmp_path_factory):
    """{layout: results of its ranks} of a mixture of experts, and the setup."""
    folder = tmp_path_factory.mktemp("experts")
    setup = {
        "tidar": {"block_size": BLOCK},
        "model": {**SHAPE, "num_experts": 4, "moe_ffn_hidden_size": 48, "moe_aux_loss_coeff": 0.01},
        "data": {"train_data": str(shards[0]), "valid_data": str(shards[1]), "seq_length": LENGTH},
        "training": {"global_batch_size": SEQUENCES, "micro_batch_size": MICRO},
        "optimizer": {"lr": 1e-3},
    }
    (folder / "setup.json").write_text(json.dumps(setup))
    run_ranks(2, "-m", "tests.layouts", folder / "setup.json", folder, "ep2", "tp2sp")
    return setup, {name: torch.load(folder / f"{name}-0.pt") for name in ("ep2", "tp2sp")}, folder


@pytest.mark.parametrize("layout", ["ep2", "tp2sp"])
def test_checkpoint_of_experts_goes_on_in_one_rank(expert_runs, layout):
    """Expert-parallel or not, the optimizer's state has one form."""
    setup, results, folder = expert_runs
    trainer = Trainer.build(build_config({**setup, "checkpoint": {"load": str(folder / layout)}}))
    for theirs in results[layout]["next"]:
        ours = trainer.step()
        for key in ("ar_loss", "diffusion_loss", "grad_norm", "balancing_loss"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-5), key
    shut_down()
