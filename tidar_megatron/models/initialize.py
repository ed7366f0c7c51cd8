"""The initial weights, and the initial embedding of the mask token, both independent of the layout.

megatron-core draws a stage's weights from one random stream, so a layer's values depend on the number of stages. Here
each parameter has its own stream, keyed by the seed and its name in the full model, and is then sharded over
tensor-parallel ranks like an imported one. So a run from scratch starts from the same weights in every layout.
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
    """Initialize this rank's part of the model: norms 1, biases 0, weights normal with ``init_method_std``.

    The padding of the vocabulary is set to zeros without drawing random numbers, so the amount of padding changes no
    other weight. The standard deviation of projections into the residual stream is divided by sqrt(2 * layers), as in
    Megatron-LM.
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
        shape = kind.full_shape(parameter.shape, group.size())
        generator = _generator(seed, name, parameter.device)
        full = torch.zeros(shape, dtype=torch.float32, device=parameter.device)
        ids = model.unpadded_vocab_size if name in VOCABULARY else shape[0]
        full[:ids].normal_(0.0, std, generator=generator)
        parameter.copy_(kind.part(full, group.rank(), group.size()))


def _generator(seed: int, name: str, device: torch.device) -> torch.Generator:
    key = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:7], "big")
    return torch.Generator(device).manual_seed(key)


@torch.no_grad()
def initialize_drafts(chunks: list[GPTModel], seed: int, output_std: float = 0.0) -> None:
    """Initialize this rank's part of the draft weights.

    Of a pair, A is normal with variance 1 / inputs and B is zero, so the masks first see the base model as it is. The
    mask token's row is a sample around the mean of the embeddings with their standard deviation, channel by channel. Of
    the selector, the candidates' weight is small and the gate's bias 1.

    Args:
        chunks: this rank's part of the model; the base weights must be set.
        seed: the seed of all draws.
        output_std: the standard deviation of B, for checks in which every weight should matter.
    """
    for name, parameter, model in own_parameters(chunks, drafts=True):
        group, (kind, _) = shard_group(model, name), kind_of(name)
        if name == "mask_embedding.weight":
            table = model.embedding.word_embeddings.weight
            row = sample_row(table, model.unpadded_vocab_size, group, _generator(seed, name, torch.device("cpu")))
            parameter.copy_(row)
            continue
        if name == "selector.gate_bias":
            parameter.fill_(1.0)
            continue
        shape = kind.full_shape(parameter.shape, group.size())
        full = torch.zeros(shape, dtype=torch.float32, device=parameter.device)
        by_inputs = name.endswith((".a", "selector.previous", "selector.gate"))
        std = shape[1] ** -0.5 if by_inputs else 0.02 if name.startswith("selector.") else output_std
        full.normal_(0.0, std, generator=_generator(seed, name, parameter.device))
        parameter.copy_(kind.part(full, group.rank(), group.size()))


def sample_row(rows: Tensor, count: int, group: dist.ProcessGroup | None, generator: torch.Generator | None) -> Tensor:
    """Return the mean of the first ``count`` rows of a table, or a sample around it: float64 ``[h]``.

    Args:
        rows: this rank's rows of the table, ``[V / TP, h]``.
        count: how many rows of the full table count.
        group: the ranks that share the table; None if ``rows`` is the full one.
        generator: the source of the sample, on the CPU; its standard deviation is the rows', channel by channel. None
            for the mean.
    """
    first = group.rank() * len(rows) if group is not None else 0
    sums = rows.new_zeros(2, rows.shape[1], dtype=torch.float64)
    for some in rows[: max(0, count - first)].split(ROWS_AT_ONCE):  # a full float64 copy would be large
        sums += torch.stack([some.double().sum(0), some.double().square().sum(0)])
    if group is not None and group.size() > 1:
        dist.all_reduce(sums, group=group)
    mean, square = sums / count
    if generator is None:
        return mean
    noise = torch.randn(mean.shape, generator=generator)
    return mean + (square - mean.square()).clamp(min=0).sqrt() * noise.to(mean)


@dataclass(frozen=True)
class MaskRow:
    """The initial embedding of the mask token in a model without one, and the initial rows of ids that were added.

    Attributes:
        kind: ``mean``: the mean of the embeddings; ``normal``: a sample around that mean with their standard deviation,
            channel by channel; ``keep``: the row as it is, which must not be zeros.
        mask_token_id: the mask token's row; None if rows are only added.
        source_rows: the number of ids that the model had before.
        vocab_size: the number of ids that it has now. Added rows other than the mask token's are the mean of the
            existing rows, in the embedding and in the output layer.
    """

    kind: str
    mask_token_id: int | None
    source_rows: int
    vocab_size: int

    @torch.no_grad()
    def fill(self, rows: Tensor, name: str, group: dist.ProcessGroup | None = None) -> None:
        """Set the new rows of a parameter in place.

        Args:
            rows: this rank's rows of the padded vocabulary, ``[V / TP, h]``.
            name: the parameter's name in the full model, one of ``VOCABULARY``.
            group: the tensor-parallel ranks; None if ``rows`` is the full parameter.

        Raises:
            UserError: the kind is ``keep``, but the mask token's row is all zeros, as an added row is.
        """
        mask = self.mask_token_id if name == VOCABULARY[0] else None
        new = {*range(self.source_rows, self.vocab_size)}
        first = group.rank() * len(rows) if group is not None else 0
        if mask is not None and self.kind != "keep":
            new.add(mask)
        elif mask is not None and first <= mask < first + len(rows) and not rows[mask - first].any():
            # The masks of a document's first block see only each other, so their states would be zero in every
            # layer, and each RMSNorm would multiply their gradient by 1 / sqrt(epsilon) until it overflows.
            raise UserError(
                f"--init-mask-token keep: row {mask} is all zeros, which cannot be trained; use mean or normal"
            )
        if not new:
            return
        mean = row = sample_row(rows, self.source_rows, group, None)
        if mask is not None and self.kind == "normal":
            row = sample_row(rows, self.source_rows, group, torch.Generator().manual_seed(mask))
        for number in sorted(new):
            if first <= number < first + len(rows):
                rows[number - first] = (row if number == mask else mean).to(rows.dtype)


def start_mask_row(chunks: list[GPTModel], row: MaskRow) -> None:
    """Apply :meth:`MaskRow.fill` to this rank's part of the model."""
    for name, parameter, model in own_parameters(chunks):
        if name in VOCABULARY:
            row.fill(parameter.data, name, shard_group(model, name))
