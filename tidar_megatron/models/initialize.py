"""Random weights, and the mask token's first embedding, that do not depend on the layout.

megatron-core draws a stage's weights from one stream, so a layer's values depend on how many stages there are. Here
each parameter has a stream of its own, keyed on the seed and its name in the whole model, and tensor parallelism cuts
it as it cuts an imported one: a run from scratch starts from the same weights in every layout.
"""

import hashlib
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from tidar_megatron.errors import UserError
from tidar_megatron.models.parameters import VOCABULARY, kind_of, own_parameters, shard_group

ROWS_AT_ONCE = 1024


@torch.no_grad()
def initialize_weights(chunks: list[GPTModel], seed: int) -> None:
    """Fill this rank's part of the model: norms 1, biases 0, weights normal with ``init_method_std``.

    The padding of the vocabulary is zeros, and no number is drawn for it: the others do not depend on how much there
    is. The projections back into the residual stream are smaller by sqrt(2 * layers), as in Megatron-LM.
    """
    for name, parameter, model in own_parameters(chunks):
        transformer, group = model.config, shard_group(model, name)
        if parameter.dim() == 1:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            continue
        kind, _ = kind_of(name)
        std = transformer.init_method_std
        if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
            std /= (2 * transformer.num_layers) ** 0.5
        shape = kind.whole_shape(parameter.shape, group.size())
        key = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:7], "big")
        generator = torch.Generator(parameter.device).manual_seed(key)
        whole = torch.zeros(shape, dtype=torch.float32, device=parameter.device)
        ids = model.unpadded_vocab_size if name in VOCABULARY else shape[0]
        whole[:ids].normal_(0.0, std, generator=generator)
        parameter.copy_(kind.part(whole, group.rank(), group.size()))


@dataclass(frozen=True)
class MaskRow:
    """How the mask token's embedding starts in a model that has not learned it, and the rows a vocabulary has grown by.

    Attributes:
        kind: ``mean`` of the embeddings; ``normal``: with their standard deviation around it, by channel; ``keep``
            what is there, unless that is nothing.
        mask_token_id: the row; None: rows are only added.
        source_rows: ids that the model had.
        vocab_size: ids that it has now; the output layer's new rows are the mean of the others too.
    """

    kind: str
    mask_token_id: int | None
    source_rows: int
    vocab_size: int

    @torch.no_grad()
    def fill(self, rows: Tensor, name: str, group: dist.ProcessGroup | None = None) -> None:
        """Set the new rows of a parameter in place.

        Args:
            rows: this rank's ``[V / TP, h]`` of the padded vocabulary.
            name: of the parameter in the whole model, one of ``VOCABULARY``.
            group: the tensor-parallel ranks; None: ``rows`` is all of it.

        Raises:
            UserError: the row that is to be kept is zeros, as a new one is.
        """
        mask = self.mask_token_id if name == VOCABULARY[0] else None
        new = {*range(self.source_rows, self.vocab_size)}
        first = group.rank() * len(rows) if group is not None else 0
        if mask is not None and self.kind != "keep":
            new.add(mask)
        elif mask is not None and first <= mask < first + len(rows) and not rows[mask - first].any():
            # the masks of a document's first block see each other alone: their states would be zero in every
            # layer, and each RMSNorm multiply their gradient by 1 / sqrt(epsilon), until it is no number
            raise UserError(
                f"--init-mask-token keep: row {mask} is zeros, from which nothing can be learned; use mean or normal"
            )
        if not new:
            return
        sums = rows.new_zeros(2, rows.shape[1], dtype=torch.float64)
        for some in rows[: max(0, self.source_rows - first)].split(ROWS_AT_ONCE):  # a vocabulary in float64 is large
            sums += torch.stack([some.double().sum(0), some.double().square().sum(0)])
        if group is not None and group.size() > 1:
            dist.all_reduce(sums, group=group)
        mean, square = sums / self.source_rows
        row = mean
        if mask is not None and self.kind == "normal":
            noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(mask))
            row = mean + (square - mean.square()).clamp(min=0).sqrt() * noise.to(mean)
        for number in sorted(new):
            if first <= number < first + len(rows):
                rows[number - first] = (row if number == mask else mean).to(rows.dtype)


def start_mask_row(chunks: list[GPTModel], row: MaskRow) -> None:
    """:meth:`MaskRow.fill` of this rank's part of the model."""
    for name, parameter, model in own_parameters(chunks):
        if name in VOCABULARY:
            row.fill(parameter.data, name, shard_group(model, name))
