"""The planner against measurement: real models on real CPU tensors, of one rank and of played ranks of larger layouts.

A played rank (``distributed/fake.py``) holds and saves exactly what it would among real neighbours; only the values
that collectives bring mean nothing.
"""

import weakref
from collections import Counter

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from tests.planning.models_to_plan import CP2, DRAFTS, MOE, PP2, SELECTIVE, TP2, sizes_of
from tidar_megatron.attention_mask import may_attend, training_area, training_layout
from tidar_megatron.context_parallel import key_tokens, query_slices
from tidar_megatron.data.blocks import strata
from tidar_megatron.data.doubled import make_batch
from tidar_megatron.data.packing import Piece, pack
from tidar_megatron.distributed.fake import play_rank
from tidar_megatron.distributed.groups import shut_down
from tidar_megatron.models.attention.tiles import Squares, make_tilings
from tidar_megatron.models.gpt import build_model, run_model
from tidar_megatron.models.loss import draft_loss, joint_loss
from tidar_megatron.planning.attention_work import tiles
from tidar_megatron.planning.built_ranks import build_shard
from tidar_megatron.planning.flops import stage_flops
from tidar_megatron.planning.hardware import HARDWARE
from tidar_megatron.planning.memory import activations_of, loss_bytes, memory_of
from tidar_megatron.planning.traffic import traffic_of
from tidar_megatron.training.optimizer import build_optimizer, wrap_model
from tidar_megatron.training.step import forward_backward

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
        1, MOE, recompute_granularity="selective", recompute_modules=["core_attn"]
    ),
    "experts recomputed": lambda: sizes_of(1, MOE, recompute_granularity="selective", recompute_modules=["moe"]),
    "half of the blocks": lambda: sizes_of(2, training={"micro_batch_size": 2}, fraction=0.5, **CP2),
    "DP4, bf16, dist-opt": lambda: sizes_of(4, training={"bf16": True}, use_distributed_optimizer=True),
    "24 blocks anywhere": lambda: sizes_of(2, training={"micro_batch_size": 2}, anywhere=24, **CP2),
    "drafts, float32": lambda: sizes_of(1, drafts=DRAFTS),
    "drafts, 24 blocks anywhere, kl, bf16": lambda: sizes_of(
        1, training={"bf16": True, "micro_batch_size": 2}, anywhere=24, drafts={**DRAFTS, "draft_loss": "kl"}
    ),
    "drafts, TP2xPP2+SP, bf16, no qk norm": lambda: sizes_of(
        4, {"qk_layernorm": False}, {"bf16": True}, drafts=DRAFTS, **TP2, **PP2
    ),
    "drafts, tied, two modules, full": lambda: sizes_of(
        1,
        {"untie_embeddings_and_output_weights": False},
        drafts={**DRAFTS, "draft_modules": ["linear_qkv", "linear_fc2"], "draft_selector": 0},
        recompute_granularity="full",
    ),
    "drafts, CP2xDP2, dist-opt, selective": lambda: sizes_of(
        4, drafts=DRAFTS, use_distributed_optimizer=True, **CP2, **SELECTIVE
    ),
}


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
    config, chosen = sizes.config, None
    if config.chosen_blocks < config.blocks:  # those in the middle of their strata, as the planner takes them
        edges = strata(config.blocks, config.chosen_blocks)
        chosen = np.stack([(edges[:-1] + edges[1:] - 1) // 2] * sizes.b)
    starts = None
    if sizes.anywhere:
        edges = strata(length, config.chosen_blocks)
        chosen, starts = None, np.stack([(edges[:-1] + edges[1:] - 1) // 2] * sizes.b)
    whole = make_batch([row] * sizes.b, config.tidar.block_size, 249, chosen=chosen, starts=starts)
    return whole.shard(ranks.groups.cp.rank(), ranks.groups.cp.size())


def forward(sizes, chunk, batch):
    if not chunk.pre_process:
        shape = sizes.residual_tokens * sizes.rows // sizes.graph_tokens, sizes.b, sizes.h
        chunk.set_input_tensor(torch.randn(shape, dtype=chunk.config.params_dtype).requires_grad_())
    hidden = run_model(chunk, batch)
    loss = draft_loss if sizes.trains_drafts else joint_loss
    return loss(chunk, batch, hidden)[0] if chunk.post_process else hidden


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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world_size", "parallel"),
    [
        (1, {}),
        (4, {"pipeline_model_parallel_size": 4}),
        (4, {**TP2, **PP2}),
        (2, {**PP2, **VPP2}),
        (4, {"pipeline_model_parallel_size": 4, **VPP2}),
        (2, {**PP2, **VPP2, "recompute_granularity": "full"}),
        (2, {**PP2, "drafts": DRAFTS}),
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


class LiveTensors(TorchDispatchMode):
    """Bytes of the tensors that operators made and that are still there, at most."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {leaf.untyped_storage()._cdata for leaf in tensors_of((args, kwargs))}
        for leaf in tensors_of(out):
            storage = leaf.untyped_storage()
            if storage._cdata not in given and storage._cdata not in self.alive:
                self.alive[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.alive.pop, storage._cdata)
        self.peak = max(self.peak, sum(self.alive.values()))
        return out


def tensors_of(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


@pytest.mark.parametrize("bf16", [False, True])
def test_the_loss_at_its_fullest(bf16):
    sizes = sizes_of(1, {"vocab_size": 9984, "hidden_size": 320}, {"bf16": bf16})
    with play_rank(sizes.config.parallel, 0, 1, "cpu") as ranks:
        (chunk,) = build_model(sizes.config, sizes.config.model.vocab_size, ranks)
        batch = a_batch(sizes, ranks)
        hidden = run_model(chunk, batch).detach().requires_grad_()
        with LiveTensors() as live:
            joint_loss(chunk, batch, hidden)[0].backward()
    assert loss_bytes(sizes) - hidden.nbytes == pytest.approx(live.peak, rel=0.01)


@pytest.mark.parametrize(
    ("length", "block", "chunk", "size"),
    [(128, 8, 32, 1), (64, 4, 10, 2), (96, 8, 20, 3), (96, 16, 7, 1), (64, 4, 256, 1)],
)
def test_tiles_are_those_of_the_backend(length, block, chunk, size):
    visibility = training_layout(torch.zeros(length, dtype=torch.long), torch.arange(length), block)
    assert training_area(length, block)[0] == int(may_attend(visibility, visibility).sum())
    for rank in range(size):
        keys = visibility[key_tokens(length, rank, size, doubled=True)].unsqueeze(0)
        queries = query_slices(2 * length // size, keys.shape[1], rank, size)
        (tiling,) = make_tilings(keys, queries, chunk, causal=False)
        found = tiles(length, block, chunk, rank, size)
        executed = torch.zeros(2 * length // size, keys.shape[1], dtype=torch.int)
        for step in tiling.steps:
            if isinstance(step, Squares):
                for n in range(0, step.queries.stop - step.queries.start, step.size):
                    q, k = (slice(part.start + n, part.start + n + step.size) for part in (step.queries, step.keys))
                    executed[q, k] += 1
            else:
                executed[step.queries, step.keys] += 1
        asking = torch.cat([keys[0, part] for part in queries])
        assert int(executed.max()) == 1 and bool(executed[may_attend(asking, keys[0])].all())
        assert found.area == int(executed.sum())
        assert found.masks == sum(mask.numel() for mask in tiling.masks)
        assert (found.keys, found.calls) == (keys.shape[1], len(tiling.steps))


class SentBytes(TorchDispatchMode):
    """What collectives and sends of a process amount to, by the ranks of the group: ring passes of the whole buffer."""

    def __init__(self):
        super().__init__()
        self.by_group = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        if name.startswith("c10d::") and "recv" not in name:
            groups = [dist.ProcessGroup.unbox(a) for a in args if isinstance(a, torch.ScriptObject) and is_group(a)]
            flat = [t for a in args for t in (a if isinstance(a, list | tuple) else [a]) if isinstance(t, torch.Tensor)]
            for group in groups:
                whole = max(t.numel() * t.element_size() for t in flat)
                n = group.size()
                passes = 1 if "send" in name else (n - 1) / n * (2 if "allreduce" in name else 1)
                self.by_group[tuple(dist.get_process_group_ranks(group))] += whole * passes
        return func(*args, **(kwargs or {}))


def is_group(script_object):
    return "ProcessGroup" in str(script_object._type())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world_size", "parallel", "model"),
    [
        (2, {"tensor_model_parallel_size": 2}, {}),
        (4, {**TP2, **PP2}, {}),
        (2, {**TP2, "recompute_granularity": "full"}, {}),
        (2, {**TP2, "recompute_granularity": "selective", "recompute_modules": ["mlp"]}, {}),
        (4, {**CP2, **TP2, "recompute_granularity": "selective"}, {}),
        (4, {**TP2, "use_distributed_optimizer": True}, {}),
        (2, {**PP2, **VPP2}, {}),
        (2, PP2, {"untie_embeddings_and_output_weights": False}),
        (4, {**TP2, **PP2, "drafts": DRAFTS}, {}),
        (2, {"tensor_model_parallel_size": 2, "drafts": {**DRAFTS, "draft_loss": "kl"}}, {}),
        (4, {**CP2, "drafts": DRAFTS, "use_distributed_optimizer": True}, {}),
        (2, {**PP2, "drafts": DRAFTS}, {"untie_embeddings_and_output_weights": False}),
    ],
)
def test_traffic_is_what_a_step_sends(world_size, parallel, model):
    """Forward, backward, gradients and weights of a whole step; the planner leaves out scalars and the loss's sums."""
    sizes = sizes_of(world_size, model, training={"bf16": True}, **parallel)
    stage = sizes.pp - 1
    with play_rank(sizes.config.parallel, stage * world_size // sizes.pp, world_size, "cpu") as ranks:
        groups = ranks.groups
        model = wrap_model(build_model(sizes.config, sizes.config.model.vocab_size, ranks), sizes.config)
        for chunk in model:
            for group in chunk.bucket_groups:
                group.ddp_config.check_for_nan_in_grad = False  # the neighbours' gradients are noise
        optimizer, _ = build_optimizer(model, sizes.config)
        with SentBytes() as sent:
            forward_backward(model, [a_batch(sizes, ranks) for _ in range(sizes.micro_batches)], 1.0, ranks)
            optimizer.step()
        names = {"TP": groups.tp, "CP": groups.cp, "DP": groups.dp_cp, "PP": groups.pp}
        expected = Counter()
        for traffic in traffic_of(sizes, stage, HARDWARE["h100"]):
            expected[tuple(dist.get_process_group_ranks(names[traffic.group]))] += traffic.bytes
    assert expected
    for group, planned in expected.items():
        assert planned == pytest.approx(sent.by_group[group], rel=0.03)
