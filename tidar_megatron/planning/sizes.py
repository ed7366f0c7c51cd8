"""The sizes of the work on one rank of a layout, the quantities of the planner's arithmetic.

Symbols: b sequences per micro-batch, S clean tokens per sequence, h hidden size, d channels per head, f feed-forward
width, V padded vocabulary, w bytes per parameter or activation (bfloat16 2, float32 4).
"""

from dataclasses import dataclass
from functools import cached_property

from tidar_megatron.config import Config, ResolvedConfig, check_config, check_world_size
from tidar_megatron.errors import UserError
from tidar_megatron.models.attention.flex import BLOCK as FLEX_BLOCK
from tidar_megatron.models.gpt import padded_vocab_size
from tidar_megatron.planning.attention_work import Queries, Tiles, largest_tiles


@dataclass(frozen=True)
class Sizes:
    """The sizes of a configuration on a number of GPUs, per rank unless a docstring says otherwise."""

    config: ResolvedConfig
    world_size: int

    @staticmethod
    def of(config: Config, world_size: int) -> "Sizes":
        """Check the configuration and return its sizes.

        Raises:
            UserError: the layout contradicts the model, or cannot use exactly ``world_size`` GPUs.
        """
        resolved = require_vocabulary(config)
        check_config(resolved, resolved=True)
        check_world_size(resolved, world_size)
        return Sizes(resolved, world_size)

    @cached_property
    def tp(self) -> int:
        """The tensor-parallel size."""
        return self.config.parallel.tensor_model_parallel_size

    @cached_property
    def pp(self) -> int:
        """The number of pipeline stages."""
        return self.config.parallel.pipeline_model_parallel_size

    @cached_property
    def vpp(self) -> int:
        """The number of model chunks per stage, 1 without interleaving."""
        return self.config.parallel.virtual_pipeline_model_parallel_size or 1

    @cached_property
    def cp(self) -> int:
        """The context-parallel size."""
        return self.config.parallel.context_parallel_size

    @cached_property
    def ep(self) -> int:
        """The expert-parallel size."""
        return self.config.parallel.expert_model_parallel_size

    @cached_property
    def etp(self) -> int:
        """The expert-tensor-parallel size: the number of ranks that share an expert."""
        return self.config.parallel.expert_tensor_parallel_size

    @cached_property
    def dp(self) -> int:
        """The data-parallel size."""
        return self.world_size // (self.tp * self.pp * self.cp)

    @cached_property
    def edp(self) -> int:
        """The number of replicas of an expert."""
        return self.world_size // (self.etp * self.ep * self.pp)

    @cached_property
    def micro_batches(self) -> int:
        """The number of micro-batches per step."""
        return self.config.training.global_batch_size // (self.config.training.micro_batch_size * self.dp)

    @cached_property
    def b(self) -> int:
        """The number of sequences per micro-batch."""
        return self.config.training.micro_batch_size

    @cached_property
    def trains_drafts(self) -> bool:
        """Return whether draft weights alone are trained: only masks have a backward then."""
        return self.config.trains_drafts

    @cached_property
    def mask_rows(self) -> int:
        """The mask tokens of one sequence on this rank."""
        return self.config.chosen_blocks * self.config.tidar.block_size // self.cp

    @cached_property
    def rows(self) -> int:
        """The clean and mask tokens of one sequence on this rank: 2S / CP, fewer if only some blocks have masks."""
        return self.config.data.seq_length // self.cp + self.mask_rows

    @cached_property
    def graph_rows(self) -> int:
        """The tokens of one sequence on this rank that have a backward."""
        return self.mask_rows if self.trains_drafts else self.rows

    @cached_property
    def angle_rows(self) -> int:
        """The rows of rotary angles in the graph: of one sequence, or of b if their masks are at different positions.

        As everywhere in the planner, a sequence is one document. Packed documents, whose positions restart, have b
        times as many rows.
        """
        differ = self.anywhere or self.config.chosen_blocks < self.config.blocks
        return self.graph_rows * (self.b if differ else 1)

    @cached_property
    def anywhere(self) -> bool:
        """Return whether blocks start anywhere."""
        return self.config.tidar.block_starts == "anywhere"

    @cached_property
    def tokens(self) -> int:
        """The tokens of a micro-batch on this rank, b times those of a sequence."""
        return self.b * self.rows

    @cached_property
    def graph_tokens(self) -> int:
        """The tokens of a micro-batch on this rank that have a backward."""
        return self.b * self.graph_rows

    @cached_property
    def residual_tokens(self) -> int:
        """The tokens with a backward whose residual stream this rank holds: sequence parallelism shards it over TP."""
        return self.graph_tokens // self.tp if self.config.parallel.sequence_parallel else self.graph_tokens

    @cached_property
    def h(self) -> int:
        """The hidden size."""
        return self.config.model.hidden_size

    @cached_property
    def d(self) -> int:
        """The number of channels per head."""
        return self.config.model.head_channels

    @cached_property
    def heads(self) -> int:
        """The number of query heads on this rank."""
        return self.config.model.num_attention_heads // self.tp

    @cached_property
    def groups(self) -> int:
        """The number of K/V heads on this rank."""
        return (self.config.model.num_query_groups or self.config.model.num_attention_heads) // self.tp

    @cached_property
    def experts(self) -> int | None:
        """The number of experts per layer over all ranks; None for a dense feed-forward."""
        return self.config.model.num_experts

    @property
    def feed_forward(self) -> str:
        """The feed-forward's name in ``--recompute-modules``.

        megatron-core ignores ``mlp`` in a model with experts, and ``moe`` in one without.
        """
        return "mlp" if self.experts is None else "moe"

    @cached_property
    def f(self) -> int:
        """The width of the feed-forward, or of one expert, on this rank."""
        model = self.config.model
        if model.num_experts is None:
            return model.ffn_hidden_size // self.tp
        return (model.moe_ffn_hidden_size or model.ffn_hidden_size) // self.etp

    @cached_property
    def expert_rows(self) -> int:
        """The rows that this rank's experts process if the router is balanced: each token goes to top-k experts."""
        return self.residual_tokens * self.config.model.moe_router_topk * self.etp

    @cached_property
    def vocabulary(self) -> int:
        """The rows of the output layer on this rank, including padding."""
        return padded_vocab_size(self.config.vocab_size, self.config) // self.tp

    @cached_property
    def w(self) -> int:
        """The number of bytes per parameter or activation."""
        return 2 if self.config.training.bf16 else 4

    @cached_property
    def layers(self) -> int:
        """The number of layers per stage, over all of its chunks."""
        return self.config.model.num_layers // self.pp

    @cached_property
    def chunk_layers(self) -> int:
        """The number of layers per model chunk."""
        return self.layers // self.vpp

    @cached_property
    def tied(self) -> bool:
        """Return whether the output layer's weight is tied to the embedding."""
        return not self.config.model.untie_embeddings_and_output_weights

    @cached_property
    def tiles(self) -> Tiles:
        """The work of the attention that has a backward, for one sequence on the rank with the most work."""
        return self._tiles("masks" if self.trains_drafts else "all")

    @cached_property
    def clean_tiles(self) -> Tiles:
        """The work of attention in the clean pass of ``--train drafts``."""
        return self._tiles("clean")

    def _tiles(self, which: Queries) -> Tiles:
        tidar, length = self.config.tidar, self.config.data.seq_length
        chunks = {"dense": self.rows, "chunked": tidar.attention_chunk_size}
        chunk = chunks.get(tidar.attention_backend, FLEX_BLOCK)
        return largest_tiles(length, tidar.block_size, chunk, self.cp, self.config.chosen_blocks, self.anywhere, which)

    @cached_property
    def pairs(self) -> dict[str, tuple[int, int, bool]]:
        """The widths on this rank of the linear layers that have a pair, in and out, and whether they are row-parallel.

        They are named as in ``--draft-modules``.
        """
        h, heads = self.h, self.heads * self.d
        every = {
            "linear_qkv": (h, heads + 2 * self.groups * self.d, False),
            "linear_proj": (heads, h, True),
            "linear_fc1": (h, 2 * self.f, False),
            "linear_fc2": (self.f, h, True),
        }
        return {name: every[name] for name in self.config.drafts.draft_modules} if self.trains_drafts else {}


def require_vocabulary(config: Config) -> ResolvedConfig:
    """Return the configuration as a resolved one, without reading a tokenizer or a model's folder.

    Raises:
        UserError: the config has no vocabulary size, which training would take from the tokenizer or ``--init-from``;
            or it is of a run that is not planned yet.
    """
    if config.trains_drafts and config.model.num_experts is not None:
        raise UserError("--train drafts: is not planned for a model with experts yet; plan a dense model of its size")
    return ResolvedConfig.of(
        config,
        "model.vocab_size is not in the config (training takes it from the tokenizer or --init-from), but this tool "
        "needs it; give --vocab-size N, the number of ids in use, including the mask token's",
    )
