"""Encoding of text as plain text: the names of special tokens in it do not become special token ids.

``split_special_tokens`` prevents a tokenizer's *added* tokens from being matched in text. It does not prevent the
*model* from returning their ids if the model's own vocabulary has their names, as a Unigram model has ``</s>`` and a
WordPiece model ``[CLS]``. The same applies to the names of bytes (``<0x41>``) with byte fallback. Such a name is split
after its first character before the model sees it, so the model encodes its parts instead.

One special id is legitimate: the unknown token, for a character that the tokenizer does not know.
"""

import copy
import json
from collections.abc import Collection, Sequence
from typing import Any

from tokenizers import Regex, Tokenizer, pre_tokenizers
from transformers import PreTrainedTokenizerFast

_IN_A_PATTERN = frozenset(r"\.^$|?*+()[]{}-#&~ ")


class PlainTextEncoder:
    """An encoder of texts with a tokenizer, without its template, truncation and padding.

    Args:
        tokenizer: A fast tokenizer; it is not modified.

    Attributes:
        unknown_id: The id of the tokenizer model's unknown token; None if it has none.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        model = _model(tokenizer)
        self.unknown_id = _unknown_id(tokenizer, model)
        self._tokenizer = tokenizer
        special = special_ids(tokenizer)
        self._forbidden = (special - {self.unknown_id}) | {tokenizer.eos_token_id}
        self._backend = copy.deepcopy(tokenizer.backend_tokenizer)
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = True  # in this library, True means: do not match them
        bytes_ = {f"<0x{byte:02X}>" for byte in range(256)} if model.get("byte_fallback") else set()
        if names := _names_from_text(self._backend, special, bytes_):
            split = pre_tokenizers.Split(_first_character_of(names), "isolated")
            before = self._backend.pre_tokenizer
            self._backend.pre_tokenizer = pre_tokenizers.Sequence([before, split]) if before else split

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text."""
        return [encoding.ids for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def fault(self, text: str, ids: Sequence[int]) -> str | None:
        """Return why ``ids``, the encoding of ``text``, must not be trained on, with a remedy; None if they may be."""
        if self._forbidden.isdisjoint(ids):
            return None
        place = next(place for place, number in enumerate(ids) if number in self._forbidden)
        begin, end = self._backend.encode(text, add_special_tokens=False).offsets[place]
        number, found = ids[place], text[begin:end]
        token = self._tokenizer.convert_ids_to_tokens(number)
        role = next((f"{role} " for role, name in self._tokenizer.special_tokens_map.items() if name == token), "")
        if number == self.unknown_id:
            return (
                f"{found!r} is unknown to the tokenizer, which writes its {role}{token!r} for it; "
                "use a tokenizer with an unknown token of its own or with byte fallback, or take it out of the text"
            )
        return (
            f"{found!r} becomes the special token {role}{token!r}, which this tokenizer also uses for text; "
            "name another token for it in tokenizer_config.json, or take it out of the text"
        )


def unknown_id(tokenizer: PreTrainedTokenizerFast) -> int | None:
    """Return the id of the tokenizer model's unknown token; None if it has none."""
    return _unknown_id(tokenizer, _model(tokenizer))


def special_ids(tokenizer: PreTrainedTokenizerFast) -> frozenset[int]:
    """Return the ids of all special tokens: those with a role (EOS, padding, ...) and those added as special."""
    added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(added.union(tokenizer.all_special_ids))


def _model(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    return json.loads(tokenizer.backend_tokenizer.to_str())["model"]


def _unknown_id(tokenizer: PreTrainedTokenizerFast, model: dict[str, Any]) -> int | None:
    if model.get("unk_token") is None:
        return model.get("unk_id")
    return tokenizer.backend_tokenizer.model.token_to_id(model["unk_token"])


def _names_from_text(backend: Tokenizer, special: Collection[int], bytes_: Collection[str]) -> list[str]:
    """Return the names of special tokens and bytes that the model itself encodes as a single piece.

    It is enough to encode each name on its own: merges within a name, and its best segmentation, do not depend on the
    text around it.
    """
    model = backend.model
    names = {model.id_to_token(number) for number in special} - {None} | set(bytes_)
    return sorted(name for name in names if [token.value for token in model.tokenize(name)] == [name])


def _first_character_of(names: Sequence[str]) -> Regex:
    """Return a pattern that matches the first character of any of the names."""
    rests: dict[str, list[str]] = {}
    for name in names:
        rests.setdefault(name[0], []).append(_escape(name[1:]))
    return Regex("|".join(f"{_escape(first)}(?={'|'.join(those)})" for first, those in rests.items()))


def _escape(text: str) -> str:
    # by hand: re.escape writes Python's syntax, and this pattern is Oniguruma's
    return "".join(f"\\{character}" if character in _IN_A_PATTERN else character for character in text)
