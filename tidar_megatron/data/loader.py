"""The batches of each training step, for one data-parallel rank.

The only state is the number of packed sequences that all ranks have consumed. Packed sequence n does not depend on the
rank or on the time of the request, so a run that resumes on another number of ranks gets the same global batches. The
source of a packed sequence is also a function of n (``blend.py``); each source counts its own epochs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tidar_megatron.data.blend import Blend, parse_blend
from tidar_megatron.data.blocks import choose_blocks, choose_starts
from tidar_megatron.data.documents import StoredDocuments
from tidar_megatron.data.doubled import Batch, make_batch
from tidar_megatron.data.packing import PackedSequence, PackedSequences, fill_sequence, pack
from tidar_megatron.data.random_masks import random_masks
from tidar_megatron.data.sources import open_documents
from tidar_megatron.errors import UserError

ORDER = 1  # the version of the data order in fingerprints; increase it if (seed, epoch, n) gives another order


@dataclass(frozen=True)
class SequenceSettings:
    """Settings that decide how documents become packed, doubled sequences.

    Attributes:
        seq_length: S, the number of clean tokens in a packed sequence.
        block_size: B.
        mask_token_id: The mask token's id, which text must not have: an id that the tokenizer does not use, or one of
            ``reserved``.
        seed: The seed of the document order in each epoch, of the choice of blocks and of random masks.
        reserved: The tokenizer's ids that no text has.
        random_masks: Whether training steps mask a random share of each block instead of every place.
        chosen_blocks: The number of blocks of a sequence that have masks in a training step; None: all S / B.
        starts_anywhere: Whether these blocks start anywhere in a training step; otherwise at multiples of B.
        reset_positions: As in :func:`tidar_megatron.data.doubled.make_batch`.
        cross_document_attention: As in :func:`tidar_megatron.data.doubled.make_batch`.
    """

    seq_length: int
    block_size: int
    mask_token_id: int
    seed: int
    reserved: Sequence[int] = ()
    random_masks: bool = False
    chosen_blocks: int | None = None
    starts_anywhere: bool = False
    reset_positions: bool = True
    cross_document_attention: bool = False


class TrainingData:
    """One or several sources of documents, delivered as doubled batches.

    Args:
        data: One path, or weight, path, weight, path, ...; a path is a folder written by ``tidar prepare-data``, or
            the prefix of a ``.bin/.idx`` pair.
        settings: The settings of the sequences.
        tokenizer: The Hugging Face tokenizer folder of ``.bin/.idx`` pairs.
        verify: Whether to read and check all data, including data that was checked before.
        flag: The flag that gave ``data``, for messages.

    Attributes:
        settings: The settings of the sequences.
        sources: The documents of each source; all have the same tokenizer, ``sources[0].load_tokenizer()``.
        weights: The weight of each source, as given.
        sequences: The packed sequences of each source.

    Raises:
        UserError: The data are damaged, the lengths do not fit, text could hold the mask token, or the sources have
            different tokenizers.
    """

    def __init__(
        self,
        data: str | Path | Sequence[str],
        settings: SequenceSettings,
        *,
        tokenizer: str | None = None,
        verify: bool = False,
        flag: str = "--train-data",
    ) -> None:
        self.settings, mask = settings, settings.mask_token_id
        parts = parse_blend([str(data)] if isinstance(data, str | Path) else data, flag)
        self.weights = [weight for weight, _ in parts]
        self.sources = [open_documents(path, tokenizer, verify) for _, path in parts]
        for source in self.sources[1:]:
            _check_same_tokenizer(self.sources[0], source)
        used = self.sources[0].tokenizer
        if mask < used.vocab_size and mask not in settings.reserved:
            raise UserError(
                f"mask token id {mask}: the tokenizer of {self.sources[0].name} uses the ids "
                f"0..{used.vocab_size - 1}; nearest that works: {used.vocab_size}"
            )
        self._text_may_hold_mask = mask < used.vocab_size
        self._fill_token = used.eos_token_id
        self._make_batch: Callable[..., Batch] = partial(
            make_batch,
            block_size=settings.block_size,
            mask_token_id=mask,
            reset_positions=settings.reset_positions,
            cross_document_attention=settings.cross_document_attention,
        )

        def packed(shuffle: bool) -> list[PackedSequences]:
            lengths = settings.seq_length, settings.block_size
            return [PackedSequences(source.index, *lengths, settings.seed, shuffle) for source in self.sources]

        self.sequences, self._in_order, self._blend = packed(True), packed(False), Blend(self.weights)

    def fingerprint(self) -> dict[str, Any]:
        """Return, by name, what decides the tokens of packed sequence n and their visibility, in plain JSON values."""
        settings = self.settings
        return {
            "data": [
                {"weight": str(weight / sum(self.weights)), **source.identity}  # 7 and 3 are 0.7 and 0.3
                for weight, source in zip(self.weights, self.sources, strict=True)
            ],
            "tokenizer": self.sources[0].tokenizer.fingerprint,
            "seq_length": settings.seq_length,
            "block_size": settings.block_size,
            "mask_token_id": settings.mask_token_id,
            "seed": settings.seed,
            "order": ORDER,
            "reset_positions": settings.reset_positions,
            "cross_document_attention": settings.cross_document_attention,
        }

    def locate(self, number: int) -> tuple[int, int, int]:
        """Return the sample id of the run's packed sequence ``number``: (source, epoch of that source, n)."""
        source, ordinal = self._blend.locate(number)
        return source, *self.sequences[source].locate(ordinal)

    def sequence(self, number: int) -> PackedSequence:
        """Return the run's packed sequence ``number``."""
        source, epoch, n = self.locate(number)
        return self._pack(self.sequences, source, epoch, n)

    def step_batches(
        self,
        consumed_sequences: int,
        global_batch_size: int,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
        doubled: bool = True,
    ) -> list[Batch]:
        """Return one rank's micro-batches of the step that consumes the next ``global_batch_size`` sequences.

        All ranks together get exactly the sequences from ``consumed_sequences`` to ``consumed_sequences +
        global_batch_size - 1``, across the end of an epoch if necessary. The blocks of a sequence that have masks
        depend only on its number. Loss weights are not set, because their totals are first summed over the ranks. The
        method is thread-safe.

        Args:
            consumed_sequences: The number of sequences that all ranks have consumed before.
            global_batch_size: The number of sequences per step, over all ranks.
            micro_batch_size: The number of sequences per micro-batch.
            dp_rank: The data-parallel rank.
            dp_size: The data-parallel size.
            doubled: Whether to add masks.

        Raises:
            UserError: The data were truncated since they were opened.
            ValueError: The global batch does not divide into micro-batches on each rank.
        """
        together = micro_batch_size * dp_size
        if not (together > 0 and global_batch_size > 0 and global_batch_size % together == 0):
            raise ValueError(
                f"{global_batch_size} sequences cannot be split into micro-batches of {micro_batch_size} "
                f"on {dp_size} ranks"
            )
        micro_batches = global_batch_size // together
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
        """Return one rank's part of the first ``max_sequences`` packed sequences, without shuffling.

        Every place of every block is masked. A blend ends when one of its sources does.

        Each sequence goes to exactly one rank. All ranks get the same number of micro-batches of the same shape,
        because all must take part in collectives; missing sequences are replaced by fill, which has no supervised
        token.

        Args:
            max_sequences: The number of sequences, over all ranks; None: all.
            micro_batch_size: The number of sequences per micro-batch.
            dp_rank: The data-parallel rank.
            dp_size: The data-parallel size.
            doubled: Whether to add masks.
            multiple: The number of micro-batches is a multiple of this (interleaved pipelines take them in groups).
        """
        total = min(self._blend.number(source, len(each)) for source, each in enumerate(self._in_order))
        total = total if max_sequences is None else min(max_sequences, total)
        micro_batches = -(-total // (micro_batch_size * dp_size * multiple)) * multiple
        fill = fill_sequence(self.settings.seq_length, self._fill_token)

        def sequence(number: int) -> PackedSequence:
            if number >= total:
                return fill
            source, n = self._blend.locate(number)
            return self._pack(self._in_order, source, 0, n)

        return [
            self._make_batch([sequence(n) for n in share], doubled=doubled)
            for share in _shares(micro_batches, micro_batch_size, dp_rank, dp_size)
        ]

    def check_same_tokenizer(self, other: "TrainingData") -> None:
        """Refuse ``other``, the held-out data, if it was written with another tokenizer.

        Raises:
            UserError: The fingerprints differ.
        """
        _check_same_tokenizer(self.sources[0], other.sources[0])

    def _pack(self, sequences: Sequence[PackedSequences], source: int, epoch: int, n: int) -> PackedSequence:
        packed = pack(sequences[source].pieces(epoch, n), self.sources[source], self._fill_token)
        mask = self.settings.mask_token_id
        if self._text_may_hold_mask and (packed.tokens == mask).any():
            raise UserError(
                f"data {self.sources[source].name}: its text holds the mask token (id {mask}); choose another "
                "with --mask-token-id, or prepare the data again with tidar prepare-data"
            )
        return packed

    def _training_batch(self, numbers: Sequence[int], doubled: bool) -> Batch:
        settings, chosen, masked, starts = self.settings, None, None, None
        ids = [self.locate(n) for n in numbers]
        sequences = [self._pack(self.sequences, *place) for place in ids]
        blocks = settings.seq_length // settings.block_size
        if doubled and settings.starts_anywhere:
            count = settings.chosen_blocks or blocks
            rows = zip(sequences, numbers, strict=True)
            starts = np.stack([choose_starts(row.diffusion_supervised, count, settings.seed, n) for row, n in rows])
        elif doubled and settings.chosen_blocks not in (None, blocks):
            chosen = np.stack([choose_blocks(blocks, settings.chosen_blocks, settings.seed, n) for n in numbers])
        if doubled and settings.random_masks:
            masked = np.stack(
                [random_masks(settings.seq_length, settings.block_size, settings.seed, n) for n in numbers]
            )
        batch = self._make_batch(sequences, doubled=doubled, chosen=chosen, masked=masked, starts=starts)
        batch.sample_ids = ids
        return batch


def _check_same_tokenizer(mine: StoredDocuments, theirs: StoredDocuments) -> None:
    if mine.tokenizer.fingerprint != theirs.tokenizer.fingerprint:
        raise UserError(
            f"data {theirs.name} was written with another tokenizer than {mine.name}; prepare both with the same one "
            "(in one call: tidar prepare-data --held-out-output)"
        )


def _shares(micro_batches: int, micro_batch_size: int, dp_rank: int, dp_size: int) -> list[range]:
    """Return the sequence numbers of each of a rank's micro-batches; micro-batch 0 of all ranks comes before 1."""
    first = [(m * dp_size + dp_rank) * micro_batch_size for m in range(micro_batches)]
    return [range(n, n + micro_batch_size) for n in first]
