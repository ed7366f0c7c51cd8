"""Draft weights on a frozen model: gradients of an independent dense model, in every layout; the base stays.

Once with aligned blocks and the data's tokens, once with everything else: blocks that start anywhere, more masks than
clean tokens, the model's own distribution, and the selector.
"""

import functools
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import reference
from tests.layouts import run_layout
from tests.random_models import write_random_model
from tests.ranks import run_ranks
from tests.training.test_parity import close, gather
from tidar_megatron.adapter import read_adapter
from tidar_megatron.attention_mask import DOCUMENT, INDEX
from tidar_megatron.checkpoint.pickles import read_metadata
from tidar_megatron.config import build_config
from tidar_megatron.data.blocks import choose_starts
from tidar_megatron.data.loader import SequenceSettings, TrainingData
from tidar_megatron.distributed.groups import shut_down
from tidar_megatron.errors import UserError
from tidar_megatron.huggingface.convert import export_run
from tidar_megatron.huggingface.origin import open_origin
from tidar_megatron.inference.cache import KVPool
from tidar_megatron.inference.forward import ForwardLayout, PackedForward, Part
from tidar_megatron.inference.loading import load_model
from tidar_megatron.models.gpt import run_model
from tidar_megatron.models.output_layer import output_weight
from tidar_megatron.models.parameters import is_draft_weight
from tidar_megatron.training.resolve import check_inputs, resolve, resolve_run
from tidar_megatron.training.trainer import Trainer

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
    """variant -> the setup, {layout: results of its ranks}, and the folder."""

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
        return setup, results, folder

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
        starts = choose_starts(~batch.padding[number, :LENGTH].numpy(), BLOCKS, 1234, number).tolist()
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
            starts = choose_starts(~batch.padding[number, :LENGTH].numpy(), BLOCKS, 1234, number).tolist()
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
    """Both weights of every pair and the mask token's row are compared, to 1e-5."""
    setup, results, _ = run_variant(variant)
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
    _, results, _ = run_variant(variant)
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


@pytest.mark.parametrize("layout", ["one", *PARALLEL])
def test_the_base_model_is_untouched(run_variant, layout):
    """Its AR loss has the same bits before and after training, while the drafts improve."""
    _, results, _ = run_variant("learned")
    for rank in results[layout]:
        assert rank["evaluation"]["ar_loss"] == rank["before"]["ar_loss"]
        assert rank["evaluation"]["diffusion_loss"] < rank["before"]["diffusion_loss"]


def test_a_checkpoint_holds_the_draft_weights_alone(run_variant):
    _, _, folder = run_variant("learned")
    (iteration,) = (folder / "one").glob("iter_*")
    stored = {key.removeprefix("optimizer.state.") for key in read_metadata(iteration).state_dict_metadata}
    weights = {key for key in stored if key.startswith(("decoder.", "selector.", "mask_embedding.", "embedding."))}
    assert weights and all(is_draft_weight(key) for key in weights)


@pytest.mark.parametrize("layout", ["one", *PARALLEL])
def test_a_checkpoint_goes_on_in_one_rank(run_variant, layout):
    setup, results, folder = run_variant("learned")
    trainer = Trainer.build(build_config({**setup, "checkpoint": {"load": str(folder / layout)}}))
    for theirs in results[layout][0]["next"]:
        ours = trainer.step()
        for key in ("diffusion_loss", "grad_norm", "learning_rate"):
            exactly = layout == "one"
            assert ours[key] == theirs[key] if exactly else ours[key] == pytest.approx(theirs[key], rel=1e-5), key
    shut_down()


def test_a_checkpoint_belongs_to_its_base(run_variant, tmp_path):
    setup, _, folder = run_variant("learned")
    write_random_model(tmp_path / "other", kind="qwen3", tie=False, rms_norm_eps=1e-5)
    weights = load_file(tmp_path / "other" / "model.safetensors")
    weights["model.norm.weight"] += 1e-3
    save_file(weights, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"other: is not the model that .* trained draft weights for"):
        export_run(folder / "one", tmp_path / "both", base=tmp_path / "other")
    training = {**setup["training"], "init_from": str(tmp_path / "other")}
    with pytest.raises(UserError, match="was started with another base_sha256"):
        Trainer.build(build_config({**setup, "training": training, "checkpoint": {"load": str(folder / "one")}}))


def test_the_engine_drafts_what_was_trained(run_variant):
    """The logits of masks in training, and those of the exported adapter behind the same tokens."""
    setup, _, folder = run_variant("learned")
    export_run(folder / "one", folder / "adapter")
    export_run(folder / "one", folder / "both", base=folder / "hf")
    export_run(folder / "one", folder / "smaller", draft_rank=1)
    assert read_adapter(folder / "smaller").config.rank == 1
    for name in ("config.json", "model.safetensors", "draft_config.json", "custom_generate"):
        assert (folder / "both" / name).exists()
    trainer = Trainer.build(build_config({**setup, "checkpoint": {"load": str(folder / "one")}}))
    batch = trainer.valid_data.evaluation_batches(1, 1, 0, 1)[0]
    with torch.no_grad():
        states = run_model(trainer.model[0], batch)[LENGTH:, 0]
        wanted = states @ output_weight(trainer.model[0]).T
    shut_down()
    model = load_model(folder / "hf", "cpu", "float32", adapter=folder / "adapter")
    assert model.drafts.selector is not None and model.block_size == BLOCK
    first = int((batch.visibility[0, :LENGTH, DOCUMENT] == batch.visibility[0, 0, DOCUMENT]).sum())
    assert first > BLOCK
    for start in range(BLOCK, first, BLOCK):
        text = batch.tokens[0, :start].tolist()
        part = Part(0, 0, text, ForwardLayout(start, (start,), BLOCK))
        with torch.inference_mode():
            found = model.logits(model.forward(PackedForward(KVPool(1, 64), [part]))[start:])
        torch.testing.assert_close(found, wanted[start : start + BLOCK, : model.vocab_size], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training": {"init_from": None}}, "--train drafts: needs --init-from"),
        ({"tidar": {"mask_token_id": 259}}, "--mask-token-id: the masks of --train drafts have a row of their own"),
        ({"tidar": {"ar_warmup_fraction": 0.5}}, "--ar-warmup-fraction: means nothing with --train drafts"),
        ({"drafts": {"draft_modules": []}}, "--draft-modules: name at least one module"),
        ({"model": {"transformer_impl": "transformer_engine"}}, "needs --transformer-impl local"),
        ({"drafts": {"draft_modules": ["linear_fc1"]}, "model": {"num_experts": 4}}, "experts have no pairs"),
        ({"model": {"num_experts": 4, "moe_aux_loss_coeff": 0.1}}, "the router of --train drafts is frozen"),
        ({"training": {"init_from": "one"}}, "holds draft weights alone; name their model"),
        ({"tidar": {"blocks_per_sequence": 3}, "parallel": {"context_parallel_size": 1}}, None),
        ({"tidar": {"block_starts": "aligned", "blocks_per_sequence": 12}}, "a sequence has 8 aligned blocks"),
    ],
)
def test_bad_settings_are_one_line(run_variant, changes, message):
    setup, _, folder = run_variant("learned")
    if changes.get("training", {}).get("init_from"):
        changes = {"training": {"init_from": str(folder / changes["training"]["init_from"])}}
    given = {name: {**setup.get(name, {}), **changes.get(name, {})} for name in {*setup, *changes}}
    if message is None:
        check_inputs(build_config(given))
        return
    with pytest.raises(UserError) as raised:
        resolve_run(check_inputs(build_config(given)))
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_a_model_that_drafts_already_is_refused(run_variant, tmp_path):
    setup, _, folder = run_variant("learned")
    base = shutil.copytree(folder / "hf", tmp_path / "hf")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "tidar": {"mask_token_id": 259, "block_size": 4}}))
    training = {**setup["training"], "init_from": str(base)}
    with pytest.raises(UserError, match="drafts already"):
        resolve_run(check_inputs(build_config({**setup, "training": training})))
