"""Tokenizers; every tokenizer is a transformers *fast* tokenizer, made from one of these specifications:

=========  ===============================================================================================
``byte``   byte-level BPE without merges: the id of a byte is its value, end of text is 256
``bpe:N``  byte-level BPE of N ids (including bytes and end of text), trained on the training documents
FOLDER     a local Hugging Face tokenizer folder; nothing is downloaded, and no code of the folder is run
=========  ===============================================================================================
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tidar_megatron.data.plain_text import PlainTextEncoder
from tidar_megatron.errors import UserError
from tidar_megatron.hf_folder.tokenizer import read_tokenizer
from tidar_megatron.mask_token import RESERVED, roles
from tidar_megatron.new_folder import os_error

END_OF_TEXT = "<|endoftext|>"
_BATCH_CHARACTERS = 1 << 20  # encoding takes about 100 bytes of memory per token


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of the 256 bytes, with ``id == byte value`` and end of text at 256."""
    # GPT-2's byte alphabet: a printable byte is its own character, the others are the characters from 256 on.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    vocabulary = {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    # Without merges, splitting into words first would only take time.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return _wrap(tokenizer)


def train_bpe(texts: Iterable[str], size: int) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE of ``size`` ids, trained on ``texts``; end of text is the last id.

    Raises:
        UserError: ``size`` is below 257, or the texts are too small to learn so large a vocabulary.
    """
    if size < 257:
        raise UserError(f"tokenizer bpe:{size}: 256 bytes and an end of text are the minimum; use bpe:257 or more")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size - 1, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    learnt = tokenizer.get_vocab_size() + 1
    if learnt != size:
        raise UserError(f"tokenizer bpe:{size}: the text yields only {learnt} ids; use bpe:{learnt} or more text")
    return _wrap(tokenizer)


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a local Hugging Face folder.

    Raises:
        UserError: The folder does not exist, or has no fast tokenizer with an end-of-text (EOS) token.
    """
    if not Path(folder).is_dir():
        raise UserError(f"tokenizer {folder}: expected byte, bpe:N, or the path of a Hugging Face tokenizer folder")
    tokenizer = read_tokenizer(folder)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(f"tokenizer {folder}: {type(tokenizer).__name__} is not a fast tokenizer (tokenizer.json)")
    if tokenizer.eos_token_id is None:
        raise UserError(f"tokenizer {folder}: has no EOS token; set eos_token in its tokenizer_config.json")
    return tokenizer


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: str | Path) -> None:
    """Write the tokenizer's files into a folder.

    Raises:
        OSError: The files cannot be written.
    """
    try:
        tokenizer.save_pretrained(str(folder))
    except OSError:
        raise
    except Exception as error:  # the Rust library raises a plain Exception if it cannot write a file
        raise os_error(error) from error


def make_tokenizer(spec: str, training_texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a specification (see the table above); only ``bpe:N`` reads ``training_texts``.

    Raises:
        UserError: The specification is unknown, or :func:`train_bpe` or :func:`load_tokenizer` fails.
    """
    if spec == "byte":
        return byte_tokenizer()
    if bpe := re.fullmatch(r"bpe:(\d{1,9})", spec):
        return train_bpe(training_texts, int(bpe[1]))
    return load_tokenizer(spec)


def fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """Return the SHA-256 (hex) of the tokenizer's definition, which decides the ids of every text."""
    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    for leftover_of_the_last_call in ("truncation", "padding"):
        definition.pop(leftover_of_the_last_call, None)
    return hashlib.sha256(json.dumps(definition, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def vocabulary_size(tokenizer: PreTrainedTokenizerFast) -> int:
    """Return the highest id in use plus one: ``len(tokenizer)``, or more if the ids have gaps."""
    return max(len(tokenizer), max(tokenizer.get_vocab().values()) + 1)


def rows_needed(folder: str | Path, model_vocab_size: int) -> int:
    """Return the number of rows that a model needs for the tokenizer in its folder, at least ``model_vocab_size``.

    Tokens such as "[PAD]" are often added to a tokenizer without a row in the model. The model then grows by these
    rows, as with transformers' ``resize_token_embeddings``.

    Args:
        folder: The model's folder, with a tokenizer.
        model_vocab_size: The number of rows that the model has.

    Raises:
        UserError: The tokenizer has ids beyond the model's rows that are not added tokens, so it is another model's.
    """
    tokenizer = load_tokenizer(folder)
    added = tokenizer.get_added_vocab()
    learned = 1 + max((number for name, number in tokenizer.get_vocab().items() if name not in added), default=-1)
    if learned > model_vocab_size:
        raise UserError(
            f"{folder}: its tokenizer has {learned} ids (without added tokens) but its model {model_vocab_size}: they "
            "do not belong together; copy the model's own tokenizer, or leave the tokenizer out"
        )
    return max(vocabulary_size(tokenizer), model_vocab_size)


def reserved_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Return the ids whose names mark them as reserved, so that no text has them, except EOS, BOS, PAD and UNK.

    Returns:
        The ids, ascending.
    """
    taken = roles({}, tokenizer)
    vocabulary = tokenizer.get_vocab()
    return sorted(number for name, number in vocabulary.items() if RESERVED.fullmatch(name) and number not in taken)


def free_id(used: int, reserved: Sequence[int], model_vocab_size: int) -> int:
    """Return an id for the mask token: a row of the model that the tokenizer does not use, a reserved id, or a new id.

    Args:
        used: The tokenizer's :func:`vocabulary_size`.
        reserved: The tokenizer's :func:`reserved_ids`.
        model_vocab_size: The number of ids that the model has.
    """
    return reserved[0] if used >= model_vocab_size and reserved else used


def encode_documents(
    tokenizer: PreTrainedTokenizerFast,
    texts: Iterable[str],
    place: Callable[[int], str] = "document {}".format,
) -> Iterator[list[int]]:
    """Yield the ids of each text in order, with end of text appended.

    Special ids do not come from text: neither from a special token's name in it ("<|endoftext|>") nor from the
    tokenizer's template (a leading BOS). The only EOS of a document is therefore its last token. The one exception is
    the unknown token, for characters that the tokenizer does not know.

    Args:
        tokenizer: The tokenizer.
        texts: The documents.
        place: A function that returns the origin of the n-th text, counted from 0; it is called for error messages.

    Raises:
        UserError: The tokenizer returns a special id for a text; the message names the text's origin.
    """
    encoder, number = PlainTextEncoder(tokenizer), 0
    for batch in _batches(texts):
        for text, ids in zip(batch, encoder.encode(batch), strict=True):
            if fault := encoder.fault(text, ids):
                raise UserError(f"{place(number)}: {fault}")
            yield [*ids, tokenizer.eos_token_id]
            number += 1


def encode_document(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Return the ids of one text, with end of text appended (see :func:`encode_documents`)."""
    return next(encode_documents(tokenizer, [text]))


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, clean_up_tokenization_spaces=False
    )
