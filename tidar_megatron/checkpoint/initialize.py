"""Random weights that do not depend on the layout.

megatron-core draws a stage's weights from one stream, so a layer's values depend on how many stages there are. Here
each parameter has a stream of its own, keyed on the seed and its name in the whole model, and tensor parallelism cuts
it as it cuts an imported one: a run from scratch starts from the same weights in every layout.
"""

import hashlib

import torch
from megatron.core.models.gpt import GPTModel

from tidar_megatron.checkpoint.mapping import cut, entry_of, own_parameters, shard_group


@torch.no_grad()
def initialize_weights(chunks: list[GPTModel], seed: int) -> None:
    """Fill this rank's part of the model: norms 1, biases 0, weights normal with ``init_method_std``.

    The projections back into the residual stream are smaller by sqrt(2 * layers), as in Megatron-LM.
    """
    for name, parameter, model in own_parameters(chunks):
        transformer, group = model.config, shard_group(model, name)
        if parameter.dim() == 1:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            continue
        entry, _ = entry_of(name)
        std = transformer.init_method_std
        if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
            std /= (2 * transformer.num_layers) ** 0.5
        shape = list(parameter.shape)
        if entry.shard != "replicated":
            shape[0 if entry.shard == "rows" else 1] *= group.size()
        key = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:7], "big")
        generator = torch.Generator(parameter.device).manual_seed(key)
        whole = torch.empty(shape, dtype=torch.float32, device=parameter.device).normal_(0.0, std, generator=generator)
        parameter.copy_(cut(entry, whole, group.rank(), group.size()))
