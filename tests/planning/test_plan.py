"""The plan: whole models counted, layouts found, and what people and programs are told."""

import json

import pytest
import torch
import yaml

from tests.conftest import ROOT
from tests.planning.models_to_plan import CP2, DRAFTS, MODEL, MOE, PP2, QWEN3_8B, QWEN3_30B_A3B, TP2, sizes_of
from tests.programs import call, own_lines
from tidar_megatron.config import build_config
from tidar_megatron.planning.built_ranks import count_distinct_parameters
from tidar_megatron.planning.estimate import Estimate
from tidar_megatron.planning.flops import executed_flops, model_flops
from tidar_megatron.planning.hardware import HARDWARE
from tidar_megatron.planning.memory import in_flight, parameters_of
from tidar_megatron.planning.report import report_layouts, save_line
from tidar_megatron.planning.saves import gathered_otherwise
from tidar_megatron.planning.search import search
from tidar_megatron.planning.sizes import Sizes
from tidar_megatron.planning.traffic import traffic_of

H100 = HARDWARE["h100"]


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


@pytest.mark.slow
def test_experts_of_a_real_model():
    """Qwen3-30B-A3B has 30,532,122,624 parameters; its layers are alike, so two of them tell."""
    two, four = (
        count_distinct_parameters(sizes_of(8, {**QWEN3_30B_A3B, "num_layers": n}, expert_model_parallel_size=8))
        for n in (2, 4)
    )
    assert two + (48 - 2) // 2 * (four - two) == 30_532_122_624


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
    return call("tools/plan.py", *arguments)


@pytest.mark.slow
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


@pytest.mark.slow
def test_the_yaml_of_the_best_is_the_best(tmp_path):
    """What the plan says to write, written into the recipe, is the layout that it meant."""

    def plan(path):
        return json.loads(run_tool("--config", path, "--gpus", 64, "--top", 1, "--json").stdout)

    recipe = ROOT / "examples/recipes/qwen3-8b-b16.yaml"
    (best,) = plan(recipe)["layouts"]
    tree = yaml.safe_load(recipe.read_text())
    tree["training"] |= best["yaml"]["training"]
    tree["parallel"] = best["yaml"]["parallel"]
    (tmp_path / "best.yaml").write_text(yaml.safe_dump(tree))
    again = plan(tmp_path / "best.yaml")["configured"]
    assert {name: again[name] for name in best if name != "yaml"} == {k: v for k, v in best.items() if k != "yaml"}


def test_a_plan_for_people():
    config = ROOT / "examples/quickstart/config.yaml"
    done = run_tool("--config", config, "--vocab-size", 257, "--gpus", 4, "--hardware", "h200", "--top", 2)
    assert done.returncode == 0, done.stderr
    for text in ("> H200 SXM", "B200", "not measured", "2407.08608", "MFU all", "MFU S", "the best 2"):
        assert text in done.stdout
    assert "config's own layout cannot use 4 GPUs: --global-batch-size 8: must be a multiple of" in done.stdout


def test_a_plan_for_draft_weights(tmp_path):
    """Less time than joint training of the same model takes, and checkpoints of the draft weights alone."""

    def plan(**more):
        return json.loads(run_tool("--config", recipe(tmp_path, QWEN3_8B, **more), "--gpus", 64, "--json").stdout)

    joint, drafts = plan(), plan(drafts={"train": "drafts"})
    ours, theirs = drafts["layouts"][0], joint["layouts"][0]
    assert ours["tokens_per_second_per_gpu"] > 1.3 * theirs["tokens_per_second_per_gpu"]
    assert sum(ours["bytes_per_save"].values()) < 0.1 * sum(theirs["bytes_per_save"].values())


def test_useful_flops_do_not_depend_on_the_layout():
    for more in ({}, {"drafts": DRAFTS}, {"anywhere": 24}):
        found = {
            model_flops(sizes_of(size, **layout, **more)) for size, layout in ((1, {}), (2, TP2), (2, PP2), (2, CP2))
        }
        assert len(found) == 1


def refusal(tmp_path, *arguments, model=QWEN3_8B, **sections):
    done = run_tool("--config", recipe(tmp_path, model, **sections), *arguments)
    (line,) = own_lines(done.stderr)
    assert done.returncode == 2 and line.startswith("error: ")
    return line


def test_bad_input(tmp_path):
    assert "--gpus 0: must be a number above 0" in refusal(tmp_path, "--gpus", "0")
    assert "invalid choice: 'a100'" in refusal(tmp_path, "--gpus", "8", "--hardware", "a100")
    no_vocabulary = {name: value for name, value in QWEN3_8B.items() if name != "vocab_size"}
    assert "give --vocab-size N" in refusal(tmp_path, "--gpus", "8", model=no_vocabulary)
    experts = {"drafts": {"train": "drafts"}, "model": QWEN3_30B_A3B}
    assert "--train drafts: is not planned for a model with experts" in refusal(tmp_path, "--gpus", "8", **experts)
    uneven = refusal(tmp_path, "--gpus", "7", parallel={})
    assert "--gpus 7: no layout can use them all" in uneven and "nearest: 511" in uneven
    small = refusal(tmp_path, "--gpus", "2", "--gpu-memory-gib", "40")
    assert "no layout of 2 GPUs fits 40 GiB" in small
    assert "GiB are the optimizer's state; --gpus 4 would fit" in small


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


def test_what_a_save_costs():
    """8B on 8 GPUs: 16.4 GB of weights on one rank, and 98.3 GB of the optimizer on one rank or on all."""
    shared, plain = (Estimate(big(8, use_distributed_optimizer=value), H100) for value in (True, False))
    line = save_line(shared, 8_190_735_360)
    gathers = "saving gathers nothing (megatron-core's fully_reshardable would gather 98.3 GB on one rank)"
    assert f"checkpoint has 114.7 GB; {gathers}; the busiest rank writes 28.7 GB" in line
    assert "saving gathers nothing; the busiest" in save_line(plain, 8_190_735_360)
    alone = Estimate(big(2, **TP2, use_distributed_optimizer=True), H100)  # one data-parallel rank
    assert "saving gathers nothing; the busiest" in save_line(alone, 8_190_735_360)
    assert "(weights 16.4, optimizer 12.3)" in line and "--use" not in line
    assert "(weights 16.4, optimizer 98.3); --use-distributed-optimizer shares" in save_line(plain, 8_190_735_360)
    assert shared.as_dict()["bytes_per_save"] == {"weights": 16_381_470_720, "optimizer": 12_286_103_040}
    experts = Estimate(sizes_of(8, MOE, use_distributed_optimizer=True, expert_model_parallel_size=4), H100)
    parameters = parameters_of(experts.sizes, 0)
    assert gathered_otherwise(experts.sizes, 0) == 12 * parameters.total
    replicated = sizes_of(4, MOE, use_distributed_optimizer=True, expert_model_parallel_size=4)
    assert gathered_otherwise(replicated, 0) == 12 * parameters_of(replicated, 0).dense
    assert experts.written.optimizer == 12 * (parameters.dense // 8 + parameters.expert // 2)


@pytest.mark.slow
def test_experts_are_planned_too():
    config = sizes_of(8, {**MOE, "moe_token_dispatcher_type": "alltoall"}, {"global_batch_size": 64}).config
    found = search(config, 8, H100, 79.0)
    assert {e.sizes.ep for e in found} >= {1, 2, 4}
    apart = next(e for e in found if e.sizes.ep == 4)
    assert any(t.group == "EP" and t.bytes > 0 for t in apart.traffic(0))
    plan = report_layouts(config, 8, H100, None, top=3)
    assert len(plan.layouts) == 3 and plan.total_parameters == count_distinct_parameters(found[0].sizes)


def test_replicas_of_experts_alone_are_traffic_too():
    """TP 2 without expert parallelism: each of the two ranks has all experts whole, and their gradients are summed."""
    sent = {one.group: one for one in traffic_of(sizes_of(2, MOE, **TP2), 0, H100)}
    assert sent["DP"].size == 2 and sent["DP"].bytes > 0


def test_a_tiny_model_can_be_planned():
    """The distributed optimizer's padding is more than a hundredth of it."""
    tiny = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "ffn_hidden_size": 48}
    config = build_config(
        {"model": {**MODEL, **tiny}, "data": {"seq_length": 128}, "training": {"global_batch_size": 8}}
    )
    assert report_layouts(config, 8, H100, None, 10).layouts
