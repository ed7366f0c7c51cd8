"""What a rank of a layout works on, in numbers: the vocabulary of the planner's arithmetic.

Symbols: b sequences of a micro-batch, S clean tokens, h hidden size, d channels of a head, f feed-forward width, V
padded vocabulary, w bytes of a parameter or activation (bfloat16 2, float32 4).
"""

from dataclasses import dataclass
from functools import cached_property

from tidar_megatron.config import Config, ResolvedConfig, check_config, check_world_size
from tidar_megatron.models.attention.flex import BLOCK as FLEX_BLOCK
from tidar_megatron.models.gpt import padded_vocab_size
from tidar_megatron.planning.attention_work import Tiles, largest_tiles


@dataclass(frozen=True)
class Sizes:
    """A configuration on a number of GPUs. Everything per rank, unless said."""

    config: ResolvedConfig
    world_size: int

    @staticmethod
    def of(config: Config, world_size: int) -> "Sizes":
        """Checked.

        Raises:
            UserError: a layout that contradicts the model, or that ``world_size`` GPUs cannot fill.
        """
        resolved = require_vocabulary(config)
        check_config(resolved, resolved=True)
        check_world_size(resolved, world_size)
        return Sizes(resolved, world_size)

    @cached_property
    def tp(self) -> int:
        """Tensor-parallel size."""
        return self.config.parallel.tensor_model_parallel_size

    @cached_property
    def pp(self) -> int:
        """Pipeline stages."""
        return self.config.parallel.pipeline_model_parallel_size

    @cached_property
    def vpp(self) -> int:
        """Model chunks a stage, 1 without interleaving."""
        return self.config.parallel.virtual_pipeline_model_parallel_size or 1

    @cached_property
    def cp(self) -> int:
        """Context-parallel size."""
        return self.config.parallel.context_parallel_size

    @cached_property
    def ep(self) -> int:
        """Expert-parallel size."""
        return self.config.parallel.expert_model_parallel_size

    @cached_property
    def etp(self) -> int:
        """Ranks that share an expert."""
        return self.config.parallel.expert_tensor_parallel_size

    @cached_property
    def dp(self) -> int:
        """Data-parallel size."""
        return self.world_size // (self.tp * self.pp * self.cp)

    @cached_property
    def edp(self) -> int:
        """Replicas of an expert."""
        return self.world_size // (self.etp * self.ep * self.pp)

    @cached_property
    def micro_batches(self) -> int:
        """Micro-batches of a step."""
        return self.config.training.global_batch_size // (self.config.training.micro_batch_size * self.dp)

    @cached_property
    def b(self) -> int:
        """Sequences of a micro-batch."""
        return self.config.training.micro_batch_size

    @cached_property
    def rows(self) -> int:
        """Tokens of one sequence on this rank, clean ones and masks: 2S / CP, fewer where blocks are chosen."""
        return (self.config.data.seq_length + self.config.chosen_blocks * self.config.tidar.block_size) // self.cp

    @cached_property
    def angle_rows(self) -> int:
        """Rows of rotary angles: those of one sequence, unless each has masks at places of its own.

        As everywhere here a sequence is one document; packed ones, whose positions begin anew, have b times as many.
        """
        return self.rows * (self.b if self.config.chosen_blocks < self.config.blocks else 1)

    @cached_property
    def tokens(self) -> int:
        """Tokens of a micro-batch: b times a sequence's."""
        return self.b * self.rows

    @cached_property
    def residual_tokens(self) -> int:
        """Of those, the ones whose residual stream lies here: sequence parallelism cuts it over TP."""
        return self.tokens // self.tp if self.config.parallel.sequence_parallel else self.tokens

    @cached_property
    def h(self) -> int:
        """Hidden size."""
        return self.config.model.hidden_size

    @cached_property
    def d(self) -> int:
        """Channels of a head."""
        return self.config.model.head_channels

    @cached_property
    def heads(self) -> int:
        """Query heads on this rank."""
        return self.config.model.num_attention_heads // self.tp

    @cached_property
    def groups(self) -> int:
        """K/V heads on this rank."""
        return (self.config.model.num_query_groups or self.config.model.num_attention_heads) // self.tp

    @cached_property
    def experts(self) -> int | None:
        """Experts of a layer, over all ranks; None: a dense feed-forward."""
        return self.config.model.num_experts

    @property
    def feed_forward(self) -> str:
        """Its name among ``--recompute-modules``: megatron-core ignores ``mlp`` for experts, and ``moe`` without."""
        return "mlp" if self.experts is None else "moe"

    @cached_property
    def f(self) -> int:
        """Width of the feed-forward, or of one expert, on this rank."""
        model = self.config.model
        if model.num_experts is None:
            return model.ffn_hidden_size // self.tp
        return (model.moe_ffn_hidden_size or model.ffn_hidden_size) // self.etp

    @cached_property
    def expert_rows(self) -> int:
        """Rows that go through this rank's experts, if the router balances: each token goes to top-k of them."""
        return self.residual_tokens * self.config.model.moe_router_topk * self.etp

    @cached_property
    def vocabulary(self) -> int:
        """Rows of the output layer on this rank, padding included."""
        return padded_vocab_size(self.config.vocab_size, self.config) // self.tp

    @cached_property
    def w(self) -> int:
        """Bytes of a parameter or an activation."""
        return 2 if self.config.training.bf16 else 4

    @cached_property
    def layers(self) -> int:
        """Layers of a stage, over its chunks."""
        return self.config.model.num_layers // self.pp

    @cached_property
    def chunk_layers(self) -> int:
        """Layers of one model chunk."""
        return self.layers // self.vpp

    @cached_property
    def tied(self) -> bool:
        """Whether the output layer is the embedding."""
        return not self.config.model.untie_embeddings_and_output_weights

    @cached_property
    def tiles(self) -> Tiles:
        """What attention executes for one sequence, on the context-parallel rank with the most work."""
        tidar = self.config.tidar
        chunks = {"dense": self.rows, "chunked": tidar.attention_chunk_size}
        chunk = chunks.get(tidar.attention_backend, FLEX_BLOCK)
        return largest_tiles(self.config.data.seq_length, tidar.block_size, chunk, self.cp, self.config.chosen_blocks)


def require_vocabulary(config: Config) -> ResolvedConfig:
    """Return the configuration as a resolved one: every size of the model must be in the YAML.

    Raises:
        UserError: where the tokenizer, or the folder to start from, would decide.
    """
    return ResolvedConfig.of(
        config,
        "model.vocab_size is not in the config (training takes it from the tokenizer or --init-from), and a plan "
        "needs it: give --vocab-size N, the ids in use with the mask token's",
    )
