"""The planner against measurement: real models on real CPU tensors, of one rank and of played ranks of larger layouts.

A played rank (``distributed/fake.py``) holds and saves exactly what it would among real neighbours; only the values
that collectives bring mean nothing.
"""

import json
import runpy
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from tests.conftest import ROOT
from tidar_megatron.attention_mask import may_attend, training_layout
from tidar_megatron.config import build_config
from tidar_megatron.context_parallel import key_tokens, query_slices
from tidar_megatron.data.doubled import make_batch
from tidar_megatron.data.packing import Piece, pack
from tidar_megatron.distributed.fake import play_rank
from tidar_megatron.distributed.groups import shut_down
from tidar_megatron.errors import UserError
from tidar_megatron.models.attention import make_plans
from tidar_megatron.models.gpt import build_model, run_model
from tidar_megatron.planning.estimate import Estimate
from tidar_megatron.planning.flops import executed_flops, model_flops, stage_flops
from tidar_megatron.planning.hardware import HARDWARE
from tidar_megatron.planning.memory import activations_of, in_flight, memory_of
from tidar_megatron.planning.report import make_plan
from tidar_megatron.planning.search import search
from tidar_megatron.planning.shards import build_shard, count_distinct_parameters
from tidar_megatron.planning.sizes import Sizes
from tidar_megatron.planning.tiles import mask_area, tiles
from tidar_megatron.training.optimizer import build_optimizer, wrap_model
from tidar_megatron.training.step import forward_backward

H100 = HARDWARE["h100"]
MODEL = {
    "num_layers": 4,
    "hidden_size": 64,
    "ffn_hidden_size": 160,
    "num_attention_heads": 8,
    "num_query_groups": 4,
    "vocab_size": 250,  # padded to 256
    "untie_embeddings_and_output_weights": True,
}
QWEN3_8B = {
    "num_layers": 36,
    "hidden_size": 4096,
    "ffn_hidden_size": 12288,
    "num_attention_heads": 32,
    "num_query_groups": 8,
    "kv_channels": 128,
    "untie_embeddings_and_output_weights": True,
    "vocab_size": 151936,
}
QWEN3_30B_A3B = {
    **QWEN3_8B,
    "hidden_size": 2048,
    "num_query_groups": 4,
    "num_experts": 128,
    "moe_router_topk": 8,
    "moe_ffn_hidden_size": 768,
}
TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}
CP2 = {"context_parallel_size": 2}
MOE = {"num_experts": 4, "moe_ffn_hidden_size": 48, "moe_aux_loss_coeff": 0.01}
SELECTIVE = {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp"]}


def sizes_of(world_size, model=None, training=None, **parallel):
    tree = {
        "tidar": {"block_size": 8, "attention_chunk_size": 32},
        "model": {**MODEL, **(model or {})},
        "data": {"seq_length": 128},
        "training": {"global_batch_size": 8, **(training or {})},
        "parallel": parallel,
    }
    return Sizes.of(build_config(tree), world_size)


# one rank; tensor, sequence and pipeline parallel; context parallel with the distributed optimizer; experts
LAYOUTS = {
    "one rank, float32": lambda: sizes_of(1),
    "TP2xPP2+SP, bf16, selective": lambda: sizes_of(4, training={"bf16": True}, **TP2, **PP2, **SELECTIVE),
    "CP2xDP2, dist-opt, full": lambda: sizes_of(
        4, training={"micro_batch_size": 2}, **CP2, use_distributed_optimizer=True, recompute_granularity="full"
    ),
    "CP2, bf16": lambda: sizes_of(2, training={"bf16": True}, **CP2),
    "PP2, tied, qkv bias": lambda: sizes_of(
        2, {"untie_embeddings_and_output_weights": False, "add_qkv_bias": True, "qk_layernorm": False}, **PP2
    ),
    "experts, bf16": lambda: sizes_of(1, MOE, {"bf16": True}),
    "experts, attention recomputed": lambda: sizes_of(
        1, MOE, recompute_granularity="selective", recompute_modules=["core_attn", "mlp"]
    ),
    "experts recomputed": lambda: sizes_of(1, MOE, recompute_granularity="selective", recompute_modules=["moe"]),
    "DP4, bf16, dist-opt": lambda: sizes_of(4, training={"bf16": True}, use_distributed_optimizer=True),
}


@pytest.fixture(autouse=True)
def no_job_of_ones_own():
    shut_down()  # an earlier test file's


@pytest.fixture(params=LAYOUTS)
def played(request):
    """Each stage of a layout: sizes, stage, and its first rank's chunk and micro-batch on the CPU."""
    sizes = LAYOUTS[request.param]()

    def stages():
        for stage in range(sizes.pp):
            with play_rank(
                sizes.config.parallel, stage * sizes.world_size // sizes.pp, sizes.world_size, "cpu"
            ) as ranks:
                (chunk,) = build_model(sizes.config, sizes.config.model.vocab_size, ranks)
                yield stage, chunk, a_batch(sizes, ranks)

    return sizes, stages


def a_batch(sizes, ranks):
    """A micro-batch of one document a row, as the planner assumes."""
    length = sizes.config.data.seq_length
    row = pack([Piece(0, 0, length)], [np.arange(length + 1) % 200], 0)
    whole = make_batch([row] * sizes.b, sizes.config.tidar.block_size, mask_token_id=249)
    return whole.shard(ranks.groups.cp.rank(), ranks.groups.cp.size())


def forward(sizes, chunk, batch):
    if not chunk.pre_process:
        shape = sizes.residual_tokens // sizes.b, sizes.b, sizes.h
        chunk.set_input_tensor(torch.randn(shape, dtype=chunk.config.params_dtype).requires_grad_())
    return run_model(chunk, batch, batch.labels)


def saved_bytes(chunk, run):
    """What autograd keeps for the backward: every storage once, without parameters."""
    parameters = {p.untyped_storage()._cdata for p in chunk.parameters()}
    storages, alive = {}, []

    def keep(tensor):
        alive.append(tensor)  # else its address could be given to another
        storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = run()
    return sum(size for at, size in storages.items() if at not in parameters), output


ATEN = torch.ops.aten
CPU_ATTENTION = {  # the counter knows the GPUs' kernels only
    ATEN._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *a, **kw: sdpa_flop_count(q, k, v),
    ATEN._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, q, k, v, *a, **kw: sdpa_backward_flop_count(grad, q, k, v)
    ),
}


def test_activations_and_flops_are_what_is_measured(played):
    """The issue asks for 10% and 2%; both are far closer."""
    sizes, stages = played
    for stage, chunk, batch in stages():
        measured, _ = saved_bytes(chunk, lambda chunk=chunk, batch=batch: forward(sizes, chunk, batch))
        planned = activations_of(sizes, stage == 0, stage == sizes.pp - 1, "cpu").saved
        assert planned == pytest.approx(measured, rel=0.005)
        with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
            forward(sizes, chunk, batch).float().sum().backward()
        assert stage_flops(sizes, stage).total == pytest.approx(counter.get_total_flops(), rel=1e-6)


def test_parameters_gradients_and_optimizer_are_exact(played):
    """Against a real step: every tensor of the optimizer, and the main weights that are not the model's own storage."""
    sizes, stages = played
    for stage, chunk, _ in stages():
        model = wrap_model([chunk], sizes.config)
        optimizer, _ = build_optimizer(model, sizes.config)
        optimizer.step()
        own = {p.untyped_storage()._cdata for p in chunk.parameters()}
        state = 0
        for part in getattr(optimizer, "chained_optimizers", [optimizer]):
            for parameter in (p for group in part.optimizer.param_groups for p in group["params"]):
                state += 0 if parameter.untyped_storage()._cdata in own else parameter.numel() * 4
                kept = part.optimizer.state[parameter].values()
                state += sum(t.numel() * t.element_size() for t in kept if isinstance(t, torch.Tensor) and t.dim())
        buffers = [*model[0].buffers, *model[0].expert_parallel_buffers]
        gradients = sum(b.grad_data.numel() * 4 for b in buffers)
        weights = sum(p.numel() * p.element_size() for p in chunk.parameters())
        shut_down()  # build_shard plays the rank anew
        built, planned = build_shard(sizes, stage), memory_of(sizes, stage, "cpu")
        assert (built.weight_bytes, built.gradient_bytes, built.optimizer_bytes) == (weights, gradients, state)
        assert (planned.weights, planned.parameters) == (weights, built.parameters)
        assert planned.gradients == pytest.approx(gradients, rel=0.01)  # padding
        assert planned.optimizer == pytest.approx(state, rel=0.01)


class LiveStorages:
    """How much autograd keeps, from moment to moment."""

    def __init__(self, parameters):
        self.ignored = {p.untyped_storage()._cdata for p in parameters}
        self.holders, self.now, self.peak = {}, 0, 0

    def add(self, storage, change):
        holders = self.holders.get(storage._cdata, 0) + change
        self.holders[storage._cdata] = holders
        if storage._cdata not in self.ignored and holders == max(change, 0):  # the first to come, the last to go
            self.now += change * storage.nbytes()
            self.peak = max(self.peak, self.now)

    def hooks(live):  # noqa: N805
        class Held:
            def __init__(self, tensor):
                self.tensor, self.storage = tensor, tensor.untyped_storage()
                live.add(self.storage, 1)

            def __del__(self):
                live.add(self.storage, -1)

        return torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor)


VPP2 = {"virtual_pipeline_model_parallel_size": 2}


@pytest.mark.parametrize(
    ("world_size", "parallel"),
    [
        (1, {}),
        (4, {"pipeline_model_parallel_size": 4}),
        (4, {**TP2, **PP2}),
        (2, {**PP2, **VPP2}),
        (4, {"pipeline_model_parallel_size": 4, **VPP2}),
        (2, {**PP2, **VPP2, "recompute_granularity": "full"}),
    ],
)
def test_the_peak_of_a_whole_step(world_size, parallel):
    """Through megatron-core's own schedules: how many micro-batches are in flight, stage by stage."""
    sizes = sizes_of(world_size, {"num_layers": 8}, **parallel)
    for stage in range(sizes.pp):
        with play_rank(sizes.config.parallel, stage * world_size // sizes.pp, world_size, "cpu") as ranks:
            chunks = build_model(sizes.config, sizes.config.model.vocab_size, ranks)
            model = wrap_model(chunks, sizes.config)
            chunks[0].config.finalize_model_grads_func = lambda *a, **kw: None  # the neighbours' gradients are noise
            live = LiveStorages(p for chunk in chunks for p in chunk.parameters())
            with live.hooks():
                forward_backward(model, [a_batch(sizes, ranks) for _ in range(sizes.micro_batches)], 1.0, ranks)
        planned = memory_of(sizes, stage, "cpu")
        loss = activations_of(sizes, stage == 0, stage == sizes.pp - 1, "cpu").loss
        if "recompute_granularity" in parallel:  # the recomputed layer is what the working memory is for
            assert planned.activations + loss < live.peak < planned.activations + loss + planned.working
        else:
            assert planned.activations + loss == pytest.approx(live.peak, rel=0.05)


def huggingface_parameters(model, sizes):
    """An independent count: transformers' own model on the meta device."""
    from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3MoeConfig

    common = {
        "num_hidden_layers": model["num_layers"],
        "hidden_size": model["hidden_size"],
        "intermediate_size": model["ffn_hidden_size"],
        "num_attention_heads": model["num_attention_heads"],
        "num_key_value_heads": model["num_query_groups"],
        "head_dim": sizes.d,
        "vocab_size": model["vocab_size"],
        "tie_word_embeddings": not model["untie_embeddings_and_output_weights"],
    }
    if "num_experts" in model:
        config = Qwen3MoeConfig(**common, num_experts=model["num_experts"], moe_intermediate_size=48)
    else:
        config = Qwen3Config(**common)
    with torch.device("meta"):
        return sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())


@pytest.mark.parametrize(
    ("world_size", "model", "parallel"),
    [
        (4, {}, {**TP2, **PP2}),
        (4, {"untie_embeddings_and_output_weights": False}, {**TP2, **PP2, "virtual_pipeline_model_parallel_size": 2}),
        (8, MOE, {**TP2, **CP2, "expert_model_parallel_size": 4, "expert_tensor_parallel_size": 2}),
        (8, MOE, {**PP2, "expert_model_parallel_size": 2}),
    ],
)
def test_distinct_parameters_are_those_of_the_huggingface_model(world_size, model, parallel):
    sizes = sizes_of(world_size, model, **parallel)
    assert count_distinct_parameters(sizes) == huggingface_parameters({**MODEL, **model}, sizes)


def test_experts_of_a_real_model():
    """Qwen3-30B-A3B has 30,532,122,624 parameters; its layers are alike, so two of them tell."""
    two, four = (
        count_distinct_parameters(sizes_of(8, {**QWEN3_30B_A3B, "num_layers": n}, expert_model_parallel_size=8))
        for n in (2, 4)
    )
    assert two + (48 - 2) // 2 * (four - two) == 30_532_122_624


@pytest.mark.parametrize(
    ("length", "block", "chunk", "size"),
    [(128, 8, 32, 1), (64, 4, 10, 2), (96, 8, 20, 3), (96, 16, 7, 1), (64, 4, 256, 1)],
)
def test_tiles_are_those_of_the_backend(length, block, chunk, size):
    visibility = training_layout(torch.zeros(length, dtype=torch.long), torch.arange(length), block)
    assert mask_area(length, block)[0] == int(may_attend(visibility, visibility).sum())
    for rank in range(size):
        keys = visibility[key_tokens(length, rank, size, doubled=True)].unsqueeze(0)
        queries = query_slices(2 * length // size, keys.shape[1], rank, size)
        plans = make_plans(keys, chunk, torch.float32, queries)
        rows = [plan.queries.stop - plan.queries.start for plan in plans]
        columns = [sum(part.stop - part.start for part in plan.keys) for plan in plans]
        found = tiles(length, block, chunk, rank, size)
        assert found.area == sum(r * c for r, c in zip(rows, columns, strict=True))
        assert found.copied_keys == sum(c for c, plan in zip(columns, plans, strict=True) if len(plan.keys) > 1)
        assert found.bias == sum(plan.bias.numel() for plan in plans if plan.bias is not None)
        assert (found.keys, found.calls) == (keys.shape[1], len(plans))


def recipe(tmp_path, model, **sections):
    path = tmp_path / "recipe.yaml"
    tree = {
        "tidar": {"block_size": 16},
        "model": model,
        "data": {"seq_length": 4096},
        "training": {"global_batch_size": 512, "bf16": True},
        "parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True, "use_distributed_optimizer": True},
    }
    path.write_text(yaml.safe_dump({**tree, **sections}))
    return path


def run_tool(*arguments):
    command = [sys.executable, ROOT / "tools/plan.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)


def test_the_8b_recipe_on_64_gpus():
    config = ROOT / "examples/recipes/qwen3-8b-b16.yaml"
    done = run_tool("--config", config, "--gpus", 64, "--gpu-memory-gib", 80, "--json")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["total_parameters"] == 8_190_735_360
    assert plan["layouts"]
    for layout in [*plan["layouts"], plan["configured"]]:
        assert layout["tp"] * layout["pp"] * layout["cp"] * layout["dp"] == 64
        assert {"vpp", "ep", "step_seconds"} <= layout.keys()
        assert 0 < layout["memory_gib"] <= 80
        assert 0 < layout["mfu_s"] < layout["mfu"] < 1
        assert sum(layout["seconds"].values()) == pytest.approx(layout["step_seconds"], rel=1e-3)
    steps = [layout["step_seconds"] for layout in plan["layouts"]]
    assert steps == sorted(steps)


def test_a_plan_for_people():
    config = ROOT / "examples/quickstart/config.yaml"
    done = run_tool("--config", config, "--vocab-size", 257, "--gpus", 4, "--hardware", "h200", "--top", 2)
    assert done.returncode == 0, done.stderr
    for text in ("> H200 SXM", "B200", "not measured", "2407.08608", "MFU 2S", "MFU S", "the best 2"):
        assert text in done.stdout
    assert "config's own layout cannot use 4 GPUs: --global-batch-size 8: must be a multiple of" in done.stdout


def refusal(tmp_path, *arguments, model=QWEN3_8B, **sections):
    main = runpy.run_path(str(ROOT / "tools/plan.py"))["main"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["plan.py", "--config", str(recipe(tmp_path, model, **sections)), *arguments])
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        with pytest.raises(UserError) as caught:
            main()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_bad_input(tmp_path):
    assert "--gpus 0: must be more than 0" in refusal(tmp_path, "--gpus", "0")
    assert "invalid choice: 'a100'" in refusal(tmp_path, "--gpus", "8", "--hardware", "a100")
    no_vocabulary = {name: value for name, value in QWEN3_8B.items() if name != "vocab_size"}
    assert "give --vocab-size N" in refusal(tmp_path, "--gpus", "8", model=no_vocabulary)
    uneven = refusal(tmp_path, "--gpus", "7", parallel={})
    assert "--gpus 7: no layout can use them all" in uneven and "nearest: 511" in uneven
    small = refusal(tmp_path, "--gpus", "2", "--gpu-memory-gib", "40")
    assert "no layout of 2 GPUs fits 40 GiB" in small
    assert "GiB are the optimizer's state; --gpus 8 would fit" in small


def test_exit_status_where_nothing_fits(tmp_path):
    done = run_tool("--config", recipe(tmp_path, QWEN3_8B), "--gpus", 1)
    assert done.returncode == 2 and done.stdout == ""
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: no layout of 1 GPUs fits 79 GiB: the smallest (TP 1, PP 1, CP 1, recompute full)")


def big(world_size=64, **parallel):
    tree = {"model": QWEN3_8B, "data": {"seq_length": 4096}, "training": {"global_batch_size": 512, "bf16": True}}
    return Sizes.of(build_config({**tree, "tidar": {"block_size": 16}, "parallel": parallel}), world_size)


def test_micro_batches_in_flight():
    assert [in_flight(big(pipeline_model_parallel_size=4), stage) for stage in range(4)] == [4, 3, 2, 1]
    interleaved = big(pipeline_model_parallel_size=4, virtual_pipeline_model_parallel_size=3)
    assert [in_flight(interleaved, stage) for stage in range(4)] == [15, 13, 11, 9]  # of chunks a third as deep


def test_what_a_layout_costs():
    """Directions that do not depend on any assumed efficiency."""
    plain, full = big(**TP2), big(**TP2, recompute_granularity="full")
    one, two = Estimate(plain, H100), Estimate(full, H100)
    assert two.memory.activations < one.memory.activations / 5
    assert two.seconds.step > one.seconds.step
    assert model_flops(plain) == model_flops(full)
    assert executed_flops(full) > 1.2 * executed_flops(plain)
    doubled, clean = model_flops(plain)
    assert doubled == pytest.approx(2 * clean, rel=0.01)  # B is small beside S
    sent = {t.group: t for t in one.traffic(0)}
    assert sent["TP"].link == "NVLink" and sent["DP"].link == "InfiniBand"
    assert {t.link for t in Estimate(big(8, **TP2), H100).traffic(0)} == {"NVLink"}
    distributed = Estimate(big(**TP2, use_distributed_optimizer=True), H100)
    assert distributed.memory.optimizer == pytest.approx(one.memory.optimizer / 32, rel=1e-6)
    stages = Estimate(big(**PP2), H100)
    assert stages.seconds.bubble > 0 == one.seconds.bubble


def test_experts_are_planned_too():
    config = sizes_of(8, {**MOE, "moe_token_dispatcher_type": "alltoall"}, {"global_batch_size": 64}).config
    found = search(config, 8, H100, 79.0)
    assert {e.sizes.ep for e in found} >= {1, 2, 4}
    apart = next(e for e in found if e.sizes.ep == 4)
    assert any(t.group == "EP" and t.bytes > 0 for t in apart.traffic(0))
    plan = make_plan(config, 8, H100, None, top=3)
    assert len(plan.layouts) == 3 and plan.total_parameters == count_distinct_parameters(found[0].sizes)
