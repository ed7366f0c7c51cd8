"""Bytes that a context-parallel rank sends while a micro-batch goes forward and back, by counting every collective.

    torchrun --nproc-per-node 4 -m tests.cp_traffic

prints one JSON object a line: the CP size, TiDAR or plain AR, bytes per layer, and bytes of every other kind.
"""

import inspect
import json
import sys

import torch.distributed as dist

SENT = []  # (group, bytes)


def counted(function):
    """``function``, noting what each member of its group sends."""
    parameters = inspect.signature(function).parameters

    def call(*args, **kwargs):
        given = inspect.signature(function).bind(*args, **kwargs).arguments
        group = given.get("group")
        tensor = given.get("input_tensor", given.get("input", given.get("tensor")))
        if group is not None and tensor is not None:
            each = tensor.numel() * tensor.element_size()  # a gather sends all it has to every other rank,
            if "all_gather" not in function.__name__:
                each //= group.size()  # a reduce-scatter every other rank its part
            SENT.append((group, each * (group.size() - 1)))
        return function(*args, **kwargs)

    assert "group" in parameters, function
    return call


def count_everywhere(name):
    """Replace a collective in torch.distributed, and wherever a module has bound it to a name of its own."""
    original = getattr(dist, name)
    replacement = counted(original)
    for module in list(sys.modules.values()):
        for own_name, value in list(getattr(module, "__dict__", {}).items()):
            if value is original:
                setattr(module, own_name, replacement)


def main():
    import megatron.core.tensor_parallel  # noqa: F401 - binds collectives to names of its own

    gathers = "all_gather_into_tensor reduce_scatter_tensor all_gather".split()
    for name in [*gathers, "all_reduce", "all_to_all_single", "broadcast"]:
        count_everywhere(name)

    from tidar_megatron.distributed.groups import initialize, shut_down
    from tidar_megatron.models.gpt import build_model, run_model
    from tidar_megatron.models.initialize import initialize_weights
    from tidar_megatron.models.loss import joint_loss
    from tidar_megatron.training.layout_check import Documents
    from tidar_megatron.training.layout_variants import variant_config

    for size in (2, 4):
        for heads in (1, 4):
            settings = {"context_parallel_size": size, "context_parallel_kv_heads": heads}
            config = variant_config("long", 4, settings)
            ranks = initialize(config.parallel, 0)
            chunks = build_model(config, config.model.vocab_size, ranks)
            initialize_weights(chunks, 0)
            for doubled in (True, False):
                (batch, *_) = Documents(config, 200).batches(0, config, ranks, doubled)
                SENT.clear()
                joint_loss(chunks[0], batch, run_model(chunks[0], batch))[0].backward()
                attention = sum(count for group, count in SENT if group is ranks.groups.cp)
                other = sum(count for group, count in SENT if group is not ranks.groups.cp)
                line = {"cp": size, "heads": heads, "doubled": doubled, "other": other}
                if ranks.is_main:
                    print(json.dumps({**line, "per_layer": attention / config.model.num_layers}), flush=True)
    shut_down()


if __name__ == "__main__":
    main()
