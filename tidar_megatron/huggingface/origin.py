"""The origin of a new run's weights (``--init-from``): a Hugging Face folder, or the weights of another run."""

import dataclasses
import shutil
from pathlib import Path
from typing import Protocol

from megatron.core.models.gpt import GPTModel

from tidar_megatron.adapter import weights_hash
from tidar_megatron.checkpoint.contents import intact_checkpoint, load_weights
from tidar_megatron.checkpoint.folder import latest_iteration
from tidar_megatron.checkpoint.integrity import Damaged
from tidar_megatron.config import CONFIG_FILE, ModelConfig, load_resolved_config
from tidar_megatron.data.manifest import TOKENIZER_FOLDER
from tidar_megatron.data.tokenizer import rows_needed
from tidar_megatron.errors import UserError
from tidar_megatron.hf_folder.config import GENERATION_CONFIG
from tidar_megatron.hf_folder.model import check_folder
from tidar_megatron.huggingface.families import model_from_huggingface, tidar_section
from tidar_megatron.huggingface.folders import (
    CONFIG,
    check_huggingface_tokenizer,
    has_tokenizer,
    load_huggingface_weights,
)
from tidar_megatron.huggingface.token_ids import check_mask_token

HUGGINGFACE_FOLDER = "huggingface"  # in a run's folder: the small files of the folder that its model came from
OURS = (  # fields of the new run; all others, which define the model, come from the origin
    "transformer_impl",
    "make_vocab_size_divisible_by",
    "max_position_embeddings",
    "moe_aux_loss_coeff",
    "moe_token_dispatcher_type",
    "moe_grouped_gemm",
    "init_method_std",
)


class Origin(Protocol):
    """The source of a new run's weights."""

    mask_token_id: int | None  # None: not a TiDAR model

    def model(self, ours: ModelConfig) -> ModelConfig:
        """Return ``ours`` with the fields that the origin decides, including its vocabulary size, replaced."""
        ...

    def rows_needed(self) -> int:
        """Return the number of rows that the model needs for all ids of the origin's own tokenizer."""
        ...

    def weights_hash(self) -> str:
        """Return the hash of the weights that an adapter names its base by.

        Raises:
            UserError: The origin is a run, whose weights have no such hash.
        """
        ...

    def check_tokenizer(self, data_tokenizer: str | Path) -> None:
        """Refuse data that was prepared with another tokenizer.

        Raises:
            UserError: The vocabularies differ.
        """
        ...

    def load(self, chunks: list[GPTModel]) -> None:
        """Load this rank's part of the model; vocabulary rows that the origin does not have become zeros.

        Raises:
            UserError: The origin's weights are missing, damaged, or do not fit.
        """
        ...

    def huggingface_files(self) -> Path | None:
        """Return the folder of the ``config.json`` that an export is based on; None if there is none."""
        ...


def open_origin(path: str | Path) -> Origin:
    """Return the origin at ``path``, a run's folder or a Hugging Face folder.

    Raises:
        UserError: ``path`` is neither, or its model is not supported or not complete.
    """
    return _Run(Path(path)) if (Path(path) / CONFIG_FILE).exists() else _HuggingFace(Path(path))


class _HuggingFace:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.model(ModelConfig())
        check_folder(folder, other_names=True)
        self.mask_token_id = tidar_section(folder).get("mask_token_id")
        check_mask_token(folder, self.mask_token_id)

    def model(self, ours: ModelConfig) -> ModelConfig:
        return model_from_huggingface(self._folder, ours)

    def rows_needed(self) -> int:
        rows = self.model(ModelConfig()).vocab_size
        assert rows is not None
        return rows_needed(self._folder, rows) if has_tokenizer(self._folder) else rows

    def weights_hash(self) -> str:
        return weights_hash(self._folder)

    def check_tokenizer(self, data_tokenizer: str | Path) -> None:
        check_huggingface_tokenizer(self._folder, data_tokenizer)

    def load(self, chunks: list[GPTModel]) -> None:
        load_huggingface_weights(chunks, self._folder, self.model(ModelConfig()))

    def huggingface_files(self) -> Path | None:
        return self._folder


class _Run:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._config = load_resolved_config(folder / CONFIG_FILE)
        if self._config.trains_drafts:
            base = self._config.training.init_from
            raise UserError(f"--init-from {folder}: holds draft weights alone; name their model, {base}")
        if latest_iteration(folder) is None:
            raise UserError(f"--init-from {folder}: holds no checkpoint yet")
        self.mask_token_id = self._config.tidar.mask_token_id

    def model(self, ours: ModelConfig) -> ModelConfig:
        kept = {name: getattr(ours, name) for name in OURS if getattr(ours, name) is not None}
        return dataclasses.replace(self._config.model, **kept)

    def rows_needed(self) -> int:
        return self._config.vocab_size

    def weights_hash(self) -> str:
        raise UserError(
            f"--train drafts: --init-from {self._folder} is a run; export it first (tidar convert export), because the "
            "drafts belong to a Hugging Face folder"
        )

    def check_tokenizer(self, data_tokenizer: str | Path) -> None:
        check_huggingface_tokenizer(self._folder / TOKENIZER_FOLDER, data_tokenizer)

    def load(self, chunks: list[GPTModel]) -> None:
        try:
            checkpoint = intact_checkpoint(self._folder)
        except UserError as error:
            raise UserError(f"--init-from {error}") from None
        try:
            load_weights(checkpoint, chunks)
        except Damaged as error:
            raise UserError(f"--init-from {self._folder}: {error}") from None

    def huggingface_files(self) -> Path | None:
        return kept_huggingface_files(self._folder)


def keep_huggingface_files(source: Path, run: Path) -> None:
    """Copy the configuration files of a Hugging Face folder into a run's folder, as the base of later exports."""
    kept = run / HUGGINGFACE_FOLDER
    kept.mkdir(exist_ok=True)
    for name in (CONFIG, GENERATION_CONFIG):
        if (source / name).exists():
            shutil.copyfile(source / name, kept / name)


def kept_huggingface_files(run: Path) -> Path | None:
    """Return the folder of the files that :func:`keep_huggingface_files` copied; None if the run has none."""
    kept = run / HUGGINGFACE_FOLDER
    return kept if kept.is_dir() else None
