"""The batches of each training step, for one data-parallel rank.

The only state is the number of packed sequences consumed so far by all ranks: packed sequence number n is the same
whoever asks for it and whenever, so a run resumed on another number of ranks goes on with the same global batches.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tidar_megatron.data.blocks import choose_blocks
from tidar_megatron.data.doubled import Batch, make_batch
from tidar_megatron.data.packing import PackedSequence, PackedSequences, fill_sequence, pack
from tidar_megatron.data.shards import ShardedDocuments
from tidar_megatron.errors import UserError


class TrainingData:
    """A folder of shards as doubled batches.

    Args:
        folder: written by ``tools/prepare_data.py``.
        seq_length: S, clean tokens in a packed sequence.
        block_size: B.
        mask_token_id: outside the ids the tokenizer uses.
        seed: of the order of the documents in each epoch, and of the choice of blocks.
        verify: compare the shards' hashes with the manifest.
        chosen_blocks: blocks of a sequence that have masks in a training step, 1 to S / B; default: all of them.

    Attributes:
        documents: the shards; ``documents.manifest`` and ``documents.load_tokenizer()`` tell of the tokenizer.
        sequences_per_epoch: packed sequences in an epoch.

    Raises:
        UserError: damaged data, lengths that do not fit, a mask token the text could hold.
    """

    def __init__(
        self,
        folder: str | Path,
        seq_length: int,
        block_size: int,
        mask_token_id: int,
        seed: int,
        verify: bool = True,
        chosen_blocks: int | None = None,
    ) -> None:
        self.documents = ShardedDocuments(folder, verify)
        tokenizer = self.documents.manifest.tokenizer
        if mask_token_id < tokenizer.vocab_size:
            raise UserError(
                f"mask token id {mask_token_id}: the tokenizer of {folder} uses the ids 0..{tokenizer.vocab_size - 1}; "
                f"nearest that works: {tokenizer.vocab_size}"
            )
        self.seq_length, self.block_size, self.mask_token_id = seq_length, block_size, mask_token_id
        self._fill_token, self._seed, self._chosen_blocks = tokenizer.eos_token_id, seed, chosen_blocks
        lengths = self.documents.lengths
        self._shuffled = PackedSequences(lengths, seq_length, block_size, seed)
        self._in_order = PackedSequences(lengths, seq_length, block_size, seed, shuffle=False)
        self.sequences_per_epoch = len(self._shuffled)

    def sequence(self, number: int) -> PackedSequence:
        """Packed sequence ``number``, counted over all epochs."""
        return self._pack(self._shuffled, number)

    def step_batches(
        self,
        consumed_sequences: int,
        global_batch_size: int,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
        doubled: bool = True,
    ) -> list[Batch]:
        """One rank's micro-batches of the step that consumes the next ``global_batch_size`` sequences.

        Over the ranks they are exactly the sequences ``consumed_sequences .. + global_batch_size - 1``, across the end
        of an epoch if need be. Which blocks of a sequence have masks depends on its number alone. Loss weights are not
        set yet: their totals are summed over the ranks first.

        Raises:
            UserError: the global batch does not divide into micro-batches on each rank.
        """
        check_batch_sizes(global_batch_size, micro_batch_size, dp_size)
        micro_batches = global_batch_size // (micro_batch_size * dp_size)
        return [
            self._training_batch([consumed_sequences + n for n in share], doubled)
            for share in _shares(micro_batches, micro_batch_size, dp_rank, dp_size)
        ]

    def evaluation_batches(
        self,
        max_sequences: int | None,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
        doubled: bool = True,
        multiple: int = 1,
    ) -> list[Batch]:
        """One rank's part of the first ``max_sequences`` packed sequences (None: all) in the documents' own order.

        Every block has masks.

        Each sequence is on one rank once. Every rank gets as many micro-batches of the same shape, since all must take
        part in a collective; where the sequences run out, fill without any supervised token stands in. The number of
        micro-batches is a ``multiple`` (interleaved pipelines take them in groups).
        """
        total = min(max_sequences if max_sequences is not None else len(self._in_order), len(self._in_order))
        micro_batches = -(-total // (micro_batch_size * dp_size * multiple)) * multiple
        fill = fill_sequence(self.seq_length, self._fill_token)
        return [
            make_batch(
                [self._pack(self._in_order, n) if n < total else fill for n in share],
                self.block_size,
                self.mask_token_id,
                doubled,
            )
            for share in _shares(micro_batches, micro_batch_size, dp_rank, dp_size)
        ]

    def check_same_tokenizer(self, other: "TrainingData") -> None:
        """Refuse held-out data written with another tokenizer.

        Raises:
            UserError: the fingerprints differ.
        """
        mine, theirs = self.documents.manifest.tokenizer, other.documents.manifest.tokenizer
        if mine.fingerprint != theirs.fingerprint:
            raise UserError(
                f"data {other.documents.folder} was written with another tokenizer than {self.documents.folder}; "
                "prepare both in one call (tools/prepare_data.py --held-out-output)"
            )

    def fingerprint(self) -> dict[str, Any]:
        """What decides which tokens packed sequence n holds, part by part, as JSON can hold it."""
        manifest = self.documents.manifest
        told = json.dumps([manifest.dtype, [shard.model_dump() for shard in manifest.shards]])
        return {
            "data": hashlib.sha256(told.encode()).hexdigest(),
            "tokenizer": manifest.tokenizer.fingerprint,
            "seq_length": self.seq_length,
            "block_size": self.block_size,
            "seed": self._seed,
        }

    def _pack(self, sequences: PackedSequences, number: int) -> PackedSequence:
        return pack(sequences.pieces(*sequences.locate(number)), self.documents, self._fill_token)

    def _training_batch(self, numbers: Sequence[int], doubled: bool) -> Batch:
        blocks, chosen = self.seq_length // self.block_size, None
        if doubled and self._chosen_blocks not in (None, blocks):
            chosen = np.stack([choose_blocks(blocks, self._chosen_blocks, self._seed, n) for n in numbers])
        sequences = [self.sequence(n) for n in numbers]
        return make_batch(sequences, self.block_size, self.mask_token_id, doubled, chosen)


def check_batch_sizes(global_batch_size: int, micro_batch_size: int, dp_size: int) -> None:
    """Refuse a global batch that does not divide into micro-batches on each rank.

    Raises:
        UserError: with the nearest that works.
    """
    if micro_batch_size < 1:
        raise UserError(f"micro batch size {micro_batch_size}: must be at least 1; nearest that works: 1")
    together = micro_batch_size * dp_size
    if global_batch_size < 1 or global_batch_size % together:
        nearest = max(round(global_batch_size / together), 1) * together
        raise UserError(
            f"global batch size {global_batch_size}: must be a positive multiple of micro batch size "
            f"{micro_batch_size} x {dp_size} data-parallel ranks; nearest that works: {nearest}"
        )


def _shares(micro_batches: int, micro_batch_size: int, dp_rank: int, dp_size: int) -> list[range]:
    """Of consecutive numbers, those of each micro-batch of this rank: micro-batches in turn, ranks side by side."""
    first = [(m * dp_size + dp_rank) * micro_batch_size for m in range(micro_batches)]
    return [range(n, n + micro_batch_size) for n in first]
