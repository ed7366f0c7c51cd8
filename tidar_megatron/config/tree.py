"""The configuration: a tree of sections, and what follows from several of them."""

import dataclasses
from dataclasses import dataclass

import yaml

from tidar_megatron.config.sections import (
    CheckpointConfig,
    DataConfig,
    DraftConfig,
    HealthConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    Section,
    TiDARConfig,
    TrainingConfig,
)
from tidar_megatron.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Config(Section):
    """The complete configuration."""

    tidar: TiDARConfig = dataclasses.field(default_factory=TiDARConfig)
    drafts: DraftConfig = dataclasses.field(default_factory=DraftConfig)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    training: TrainingConfig = dataclasses.field(default_factory=TrainingConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    parallel: ParallelConfig = dataclasses.field(default_factory=ParallelConfig)
    health: HealthConfig = dataclasses.field(default_factory=HealthConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    logging: LoggingConfig = dataclasses.field(default_factory=LoggingConfig)

    @property
    def trains_drafts(self) -> bool:
        """Return whether only the draft weights are trained."""
        return self.drafts.train == "drafts"

    @property
    def ar_loss_weight(self) -> float:
        """The weight of the AR loss (alpha) in this run; draft weights do not change that loss."""
        return 0.0 if self.trains_drafts else self.tidar.ar_loss_weight

    @property
    def blocks(self) -> int:
        """The number of blocks in a packed sequence, S / B."""
        return self.data.seq_length // self.tidar.block_size

    @property
    def chosen_blocks(self) -> int:
        """The number of blocks per packed sequence that have masks in a training step."""
        return self.tidar.blocks_per_sequence or max(1, round(self.tidar.diffusion_block_fraction * self.blocks))

    @property
    def ar_warmup_iters(self) -> int:
        """The number of steps that train on the next-token loss alone, before the joint loss begins."""
        return round(self.tidar.ar_warmup_fraction * self.training.train_iters)

    @property
    def lr_decay_steps(self) -> int:
        """The number of steps from the first step to the end of the learning-rate decay."""
        return self.optimizer.lr_decay_iters or self.training.train_iters

    @property
    def lr_warmup_steps(self) -> int:
        """The number of steps of linear warm-up, included in ``lr_decay_steps``."""
        given = self.optimizer.lr_warmup_iters
        return given if given is not None else round((self.optimizer.lr_warmup_fraction or 0.0) * self.lr_decay_steps)

    def to_yaml(self) -> str:
        """Return the configuration as YAML that :func:`tidar_megatron.config.load_config` reads."""
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False)


@dataclass(frozen=True)
class ResolvedConfig(Config):
    """A configuration in which the tokenizer and ``--init-from`` have nothing left to decide."""

    @classmethod
    def of(cls, config: Config, missing: str = "model.vocab_size is missing") -> "ResolvedConfig":
        """Return ``config`` as a resolved configuration.

        Raises:
            UserError: ``config`` has no vocabulary size; the message is ``missing``.
        """
        if config.model.vocab_size is None:
            raise UserError(missing)
        return cls(**{field.name: getattr(config, field.name) for field in dataclasses.fields(Config)})

    @property
    def vocab_size(self) -> int:
        """The number of token ids in use, including the mask token, without padding."""
        assert self.model.vocab_size is not None
        return self.model.vocab_size

    @property
    def mask_token_id(self) -> int:
        """The mask token's id; an imported model that has not been trained may have none."""
        assert self.tidar.mask_token_id is not None
        return self.tidar.mask_token_id
