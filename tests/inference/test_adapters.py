"""Adapters in the engine: the base model's own output in every plan, drafts as trained, one line for bad input.

``tests/training/test_drafts.py`` compares the drafts with those of the training forward.
"""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.conftest import THOROUGH
from tests.random_models import write_random_model
from tidar_megatron.adapter import MODULES, Adapter, AdapterConfig, read_adapter, weights_hash
from tidar_megatron.errors import UserError
from tidar_megatron.evaluation.certificate import certify, plans
from tidar_megatron.inference import custom_generate
from tidar_megatron.inference.adapters import without_selector
from tidar_megatron.inference.cache import KVPool
from tidar_megatron.inference.draft_weights import Pair
from tidar_megatron.inference.engine import generate, generate_batch
from tidar_megatron.inference.forward import ForwardLayout, PackedForward, Part
from tidar_megatron.inference.loading import load_model
from tidar_megatron.inference.request import DecodeOptions, parse_plan
from tidar_megatron.inference.sampling import SamplingOptions
from tidar_megatron.models import selector as training

H, FFN, HEADS, GROUPS, D, V, LAYERS, RANK, K = 64, 96, 4, 2, 16, 260, 4, 3, 6


def write_adapter(folder, base, selector_rank=5, **changes):
    """Random draft weights that fit a random model; large enough to change every draft."""
    draw = torch.Generator().manual_seed(3)
    widths = {"qkv": (H, (HEADS + 2 * GROUPS) * D), "o": (HEADS * D, H), "gate_up": (H, 2 * FFN), "down": (FFN, H)}
    tensors = {"mask_embedding": torch.randn(H, generator=draw)}
    for layer in range(LAYERS):
        for name, (inputs, outputs) in widths.items():
            tensors[f"layers.{layer}.{name}.a"] = torch.randn(RANK, inputs, generator=draw) * inputs**-0.5
            tensors[f"layers.{layer}.{name}.b"] = torch.randn(outputs, RANK, generator=draw) * 0.3
    if selector_rank:
        for name in ("previous", "candidate", "gate"):
            tensors[f"selector.{name}"] = torch.randn(selector_rank, H, generator=draw) * 0.5
        tensors["selector.gate_bias"] = torch.randn(selector_rank, generator=draw)
    given = {
        "base_sha256": weights_hash(base),
        "block_size": K,
        "rank": RANK,
        "alpha": 6.0,
        "modules": list(MODULES.values()),
        "selector_rank": selector_rank,
        "num_layers": LAYERS,
        "hidden_size": H,
        "vocab_size": V,
    }
    folder.mkdir()
    Adapter(AdapterConfig(**given | changes), tensors).save(folder)
    return folder


@pytest.fixture(scope="module", params=["llama-untied", "qwen3-tied"])
def folders(request, tmp_path_factory):
    """A base model and an adapter for it."""
    folder = tmp_path_factory.mktemp("adapter")
    kind, tie = request.param.split("-")
    base = write_random_model(folder / "base", kind=kind, tie=tie == "tied", max_position_embeddings=96)
    return base, write_adapter(folder / "drafts", base)


@pytest.fixture(scope="module")
def drafting(folders):
    return load_model(folders[0], "cpu", "float32", adapter=folders[1])


def prompts(count=6):
    draw = torch.Generator().manual_seed(1)
    return [torch.randint(256, (5 + 3 * n,), generator=draw).tolist() for n in range(count)]


def test_the_output_is_the_base_models_in_every_plan(folders, drafting):
    """The certificate compares with transformers' own output of the base folder; drafts are accepted, if by chance."""
    found = certify(drafting, folders[0], prompts(), 20, plans([2, K], drafts=True), samples=0, say=lambda text: None)
    assert found.holds and found.identical == len(prompts())


@pytest.fixture(scope="module")
def both(folders, tmp_path_factory):
    """One folder that holds the base model and the adapter."""
    base, drafts = folders
    folder = shutil.copytree(base, tmp_path_factory.mktemp("both") / "model")
    return shutil.copytree(drafts, folder, dirs_exist_ok=True)


def test_a_folder_may_hold_both(both, drafting):
    model = load_model(both, "cpu", "float32")
    assert model.drafts is not None and model.block_size == K
    for prompt in prompts():
        ours, theirs = (generate(one, prompt, parse_plan("2:6")) for one in (model, drafting))
        assert (ours.token_ids, ours.forwards) == (theirs.token_ids, theirs.forwards)


def test_transformers_decodes_it_with_the_drafts(both, monkeypatch):
    """``custom_generate`` finds the adapter beside the model's weights, once, and gives the model's own output."""
    model = AutoModelForCausalLM.from_pretrained(both)
    rows, loaded = [], []
    forward, load = custom_generate.DecodeModel.forward, custom_generate.load_adapter
    monkeypatch.setattr(
        custom_generate.DecodeModel,
        "forward",
        lambda self, packed: rows.append(packed.num_masks) or forward(self, packed),
    )
    monkeypatch.setattr(custom_generate, "load_adapter", lambda *given: loaded.append(given) or load(*given))
    for prompt in prompts()[:3]:
        given = {"input_ids": torch.tensor([prompt]), "max_new_tokens": 20, "do_sample": False}
        stock = model.generate(**given)
        for plan in ("auto", "2:6", "all:4"):
            assert torch.equal(custom_generate.generate(**given, model=model, plan=plan), stock)
    assert any(rows) and len(loaded) == 1
    model.to(torch.bfloat16)  # another dtype needs its own draft weights
    given = {"input_ids": torch.tensor([prompts()[0]]), "max_new_tokens": 5, "do_sample": False}
    assert custom_generate.generate(**given, model=model, plan="2:6").shape == (1, len(prompts()[0]) + 5)
    assert len(loaded) == 2
    weights = load_file(both / "draft_weights.safetensors")
    assert sorted(weights) and not set(weights) & set(model.state_dict())


@pytest.mark.parametrize("name", ["/gone/model", "./gone/hf", "gone/model"])
def test_a_folder_that_is_gone_needs_no_adapter(folders, name, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = AutoModelForCausalLM.from_pretrained(folders[0])
    model.name_or_path = name
    given = {"input_ids": torch.tensor([prompts()[0]]), "max_new_tokens": 5, "do_sample": False}
    assert torch.equal(custom_generate.generate(**given, model=model), model.generate(**given))


def test_a_broken_adapter_is_named_each_time(both, tmp_path):
    folder = shutil.copytree(both, tmp_path / "broken")
    (folder / "draft_config.json").write_text("{}")
    model = AutoModelForCausalLM.from_pretrained(folder)
    given = {"input_ids": torch.tensor([prompts()[0]]), "max_new_tokens": 5, "do_sample": False}
    for _ in range(2):
        with pytest.raises(UserError, match=r"draft_config\.json: format None"):
            custom_generate.generate(**given, model=model)


def test_clean_rows_have_the_bits_that_they_have_without(folders, drafting):
    base = load_model(folders[0], "cpu", "float32")
    layout = ForwardLayout(5, (2, 5), K)
    logits = []
    for model, plan in ((drafting, layout), (base, ForwardLayout(5))):
        forward = PackedForward(KVPool(1, 32), [Part(0, 0, prompts()[0][:5], plan)])
        logits.append(model.logits(model.forward(forward)[:5]))
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)  # products of more rows round otherwise in float32
    assert torch.isfinite(logits[0]).all()  # no token of the base model is left out


def test_masks_of_several_sequences_are_each_ones_own(drafting):
    """One forward over three sequences, and three forwards, give the same states."""
    parts = [Part(n, 0, prompts()[n], ForwardLayout(len(prompts()[n]), (len(prompts()[n]),), K)) for n in range(3)]
    with torch.inference_mode():
        together = drafting.forward(PackedForward(KVPool(3, 64), parts))
        apart = [drafting.forward(PackedForward(KVPool(3, 64), [part])) for part in parts]
    torch.testing.assert_close(together, torch.cat(apart), rtol=1e-4, atol=1e-4)


def test_static_shapes_draft_alike(drafting):
    """Those of a GPU, whose rows of masks are a column of zeros and ones."""
    from tidar_megatron.inference.engine import Engine

    outputs = []
    for static in (False, True):
        engine = Engine(drafting, 2, 160, static=static)
        running = [engine.submit(prompt, parse_plan(f"all:{K}")) for prompt in prompts(2)]
        steps = 0
        while not engine.is_idle:
            engine.step()
            steps += 1
        outputs.append((steps, [sequence.tokens for sequence in running]))
    assert outputs[0] == outputs[1]


def test_the_selector_walks_as_it_was_trained(folders, drafting):
    """Token by token with the training module: each draft is the best candidate after the draft before it."""
    tensors = load_file(folders[1] / "draft_weights.safetensors")
    module = training.Selector(H, 5, torch.float32)
    module.load_state_dict({name: tensors[f"selector.{name}"] for name, _ in module.named_parameters()})
    stored = load_file(folders[0] / "model.safetensors")
    table = stored.get("lm_head.weight", stored["model.embed_tokens.weight"])
    prompt, selector = prompts()[2], drafting.drafts.selector
    with torch.inference_mode():
        part = Part(0, 0, prompt, ForwardLayout(len(prompt), (len(prompt),), K))
        hidden = drafting.forward(PackedForward(KVPool(1, 64), [part]))
        states, certain = hidden[len(prompt) + 1 :], 17
        logits = drafting.logits(states)
        # twice the same sequence, as two of a batch
        offered = selector.score(torch.cat([logits] * 2), torch.cat([states] * 2), [0, K - 1], [certain, certain])
        one, other = (part.likeliest() for part in offered.split([K - 1] * 2))
        wanted, chances, before = [], [], certain
        for state, row in zip(states, logits, strict=True):
            top, ids = row.topk(16)
            scores = module(top[None], state[None], table[before][None], table[ids][None])[0]
            before = int(ids[scores.argmax()])
            wanted.append(before)
            chances.append(scores.softmax(-1).max().item())
    assert one.tokens == other.tokens == wanted != logits.argmax(-1).tolist()
    assert one.probabilities == pytest.approx(chances, rel=1e-4)


@pytest.mark.parametrize("selects", [True, False])
def test_sampling_keeps_the_base_models_distribution(folders, selects):
    """The first tokens of many samples; the selector's distributions are those that drafts are drawn from."""
    model = load_model(folders[0], "cpu", "float32", adapter=folders[1])
    if not selects:
        model.drafts = without_selector(model.drafts)
    runs = plans([3], drafts=True)
    if not THOROUGH:
        runs = {name: runs[name] for name in runs if name.startswith("2:")}
    samples = int(os.environ.get("TIDAR_SAMPLES", 1500)) if THOROUGH else 300
    found = certify(model, folders[0], prompts(1), 4, runs, samples=samples, say=lambda text: None)
    assert found.sampled and all(test["p_value"] > 1e-4 for test in found.sampled)


def test_a_clean_row_that_overflows_a_pair_stays_as_it_is():
    """A pair is computed for all rows of a static shape."""
    pair = Pair(torch.full((1, 2), 300.0).half(), torch.full((3, 1), 300.0).half())
    out = torch.tensor([[1.0, -0.0, 2.0], [0.0, 0.0, 0.0]]).half()
    pair.add(out, torch.ones(2, 2).half(), torch.tensor([False, True]))
    assert out[0].tolist() == [1.0, -0.0, 2.0] and out[1].isinf().all()


def test_a_batch_samples_what_each_sequence_samples_alone(drafting):
    options = DecodeOptions(
        mode="tidar", draft_length=K, branches=2, max_new_tokens=12, sampling=SamplingOptions(temperature=0.8, seed=5)
    )
    alone = [generate(drafting, prompt, options).token_ids for prompt in prompts(3)]
    assert [found.token_ids for found in generate_batch(drafting, prompts(3), options)] == alone


def test_quantized_weights_draft_too(folders):
    model = load_model(folders[0], "cpu", "bfloat16", adapter=folders[1], quantize="int8")
    base = load_model(folders[0], "cpu", "bfloat16", quantize="int8")
    expected = generate(base, prompts()[0], DecodeOptions("ar", max_new_tokens=16)).token_ids
    for plan in ("1:4", f"all:{K}", "auto"):
        options = DecodeOptions() if plan == "auto" else parse_plan(plan)
        assert generate(model, prompts()[0], options).token_ids[:16] == expected


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda folder: (folder / "draft_config.json").unlink(), "draft_config.json not found"),
        (lambda folder: (folder / "draft_weights.safetensors").write_bytes(b"abc"), "not a complete safetensors file"),
        (lambda folder: change(folder, format=2), "format 2, and this version reads 1"),
        (lambda folder: change(folder, rank=0), "is not an adapter's configuration"),
        (lambda folder: change(folder, modules=["q"]), "is not an adapter's configuration"),
        (lambda folder: change(folder, base_sha256="0" * 64), "was trained for other weights (SHA-256 000000000000..)"),
        (lambda folder: change(folder, vocab_size=261), "does not fit the model"),
        (lambda folder: change(folder, selector_rank=4), "does not fit the model (selector.candidate has the shape"),
    ],
)
def test_bad_adapters_are_one_line(folders, tmp_path, break_it, message):
    base, drafts = folders
    shutil.copytree(drafts, tmp_path / "broken")
    break_it(tmp_path / "broken")
    with pytest.raises(UserError) as raised:
        load_model(base, "cpu", "float32", adapter=tmp_path / "broken")
    assert message in str(raised.value) and "\n" not in str(raised.value)


def change(folder, **values):
    path = folder / "draft_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_model_that_drafts_takes_no_adapter(folders, tmp_path):
    with pytest.raises(UserError, match="drafts by itself"):
        load_model(folders[0], "cpu", "float32", mask_token_id=259, adapter=folders[1])


def test_experts_are_refused(tmp_path):
    base = write_random_model(tmp_path / "base", kind="qwen3_moe", tie=False)
    with pytest.raises(UserError, match="Qwen3MoeForCausalLM is not supported"):
        load_model(base, "cpu", "float32", adapter=write_adapter(tmp_path / "drafts", base))


def test_a_smaller_rank_keeps_the_most_of_each_product(folders):
    """Rank 2 leaves out the smallest singular value of a product of rank 3, and nothing else changes."""
    adapter = read_adapter(folders[1])
    smaller = adapter.truncated(2)
    assert smaller.config.rank == 2 and smaller.config.scale == adapter.config.scale
    for name, tensor in adapter.tensors.items():
        if not name.startswith("layers."):
            assert torch.equal(smaller.tensors[name], tensor)
        elif name.endswith(".a"):
            whole, part = (
                each.tensors[name[:-1] + "b"].double() @ each.tensors[name].double() for each in (adapter, smaller)
            )
            left_out = torch.linalg.matrix_norm(whole - part).item()
            assert left_out == pytest.approx(torch.linalg.svdvals(whole)[2].item(), rel=1e-4)
    for rank in (0, 3):
        with pytest.raises(UserError, match=f"--draft-rank {rank}: must be at least 1 and below 3"):
            adapter.truncated(rank)


def test_the_hash_knows_tensors_and_not_files(tmp_path):
    base = write_random_model(tmp_path / "base")
    found = weights_hash(base)
    shutil.copytree(base, tmp_path / "copy")
    assert weights_hash(tmp_path / "copy") == found
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    model.save_pretrained(tmp_path / "parts", max_shard_size="100KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 1 and weights_hash(tmp_path / "parts") == found
    with torch.no_grad():
        model.model.norm.weight[3] += 1e-3
    model.save_pretrained(tmp_path / "changed")
    assert weights_hash(tmp_path / "changed") != found
