"""A special token's name in a text becomes ordinary pieces, whatever kind the tokenizer is; what cannot is named."""

import json
import string
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tidar_megatron.data.plain_text import PlainTextEncoder, special_ids
from tidar_megatron.data.prepare import prepare, summary
from tidar_megatron.data.shards import ShardedDocuments
from tidar_megatron.data.tokenizer import encode_document, encode_documents, load_tokenizer, train_bpe
from tidar_megatron.errors import UserError

NAMES = {"unk_token": "<unk>", "eos_token": "</s>", "pad_token": "<pad>", "bos_token": "<s>"}
BRACKETS = {"unk_token": "[UNK]", "eos_token": "[SEP]", "pad_token": "[PAD]", "cls_token": "[CLS]"}
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
LETTERS = string.ascii_letters + string.digits + "<>/[]|.,_ "
CORPUS = ["the quick brown fox <s>jumps</s> over <b>the</b> lazy <pad>ded dog [CLS] of a class [UNK]nown"] * 3


def wrapped(tokenizer: Tokenizer, names: dict[str, str] = NAMES) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **names)


def merged(base: list[str], names: list[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A BPE vocabulary in which merges from left to right lead to every name."""
    merges = list(dict.fromkeys((name[:n], name[n]) for name in names for n in range(1, len(name))))
    pieces = dict.fromkeys([*names, *base, *("".join(pair) for pair in merges)])
    return {piece: number for number, piece in enumerate(pieces)}, merges


def byte_level_bpe(ignore_merges: bool = False) -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary, merges = merged(alphabet, list(NAMES.values()))
    merges = [] if ignore_merges else merges
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=ignore_merges)
    if ignore_merges:  # Llama 3's kind; words as they stand in the vocabulary are taken whole
        words = pre_tokenizers.Split(Regex(r" "), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
    tokenizer.decoder = decoders.ByteLevel()
    return wrapped(tokenizer)


def byte_fallback_bpe() -> PreTrainedTokenizerFast:
    """Llama 2's kind, without a pre-tokenizer."""
    vocabulary, merges = merged([*LETTERS.replace(" ", "▁"), *BYTES], list(NAMES.values()))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return wrapped(tokenizer)


def unigram(byte_fallback: bool = False) -> PreTrainedTokenizerFast:
    pieces = [(name, 0.0) for name in NAMES.values()] + [(name, 0.0) for name in BYTES if byte_fallback]
    pieces += [(piece, -3.0 - len(piece)) for piece in ["▁", *LETTERS.strip(), "▁the", "pad", "</"]]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=byte_fallback))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    metaspace = decoders.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), metaspace]) if byte_fallback else metaspace
    return wrapped(tokenizer)


def trained_unigram() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120, unk_token="<unk>", special_tokens=list(NAMES.values()), show_progress=False
    )
    tokenizer.train_from_iterator([*CORPUS, LETTERS], trainer)
    return wrapped(tokenizer)


def wordpiece(normalize: bool = False) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    if normalize:
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    else:  # words between spaces, so that one may be a special token's name
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.WordPieceTrainer(
        vocab_size=200, special_tokens=list(BRACKETS.values()), initial_alphabet=list(LETTERS), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return wrapped(tokenizer, BRACKETS)


def word_level() -> PreTrainedTokenizerFast:
    words = {word: number for number, word in enumerate([*BRACKETS.values(), "the", "dog", "["])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return wrapped(tokenizer, BRACKETS)


KINDS: dict[str, tuple[PreTrainedTokenizerFast, bool]] = {  # and whether decoding gives every text back
    "byte-level BPE": (byte_level_bpe(), True),
    "byte-level BPE, ignore_merges": (byte_level_bpe(ignore_merges=True), True),
    "byte-level BPE, trained": (train_bpe(["the quick brown fox </s><pad>" * 9], 270), True),
    "BPE, byte fallback": (byte_fallback_bpe(), True),
    "Unigram": (unigram(), False),
    "Unigram, byte fallback": (unigram(byte_fallback=True), True),
    "Unigram, trained": (trained_unigram(), False),
    "WordPiece, words": (wordpiece(), False),
    "WordPiece, BERT's": (wordpiece(normalize=True), False),
    "WordLevel": (word_level(), False),
}
ALL_NAMES = [*NAMES.values(), *BRACKETS.values(), "<|endoftext|>", "<0x41>", "<0xE3>", "</S>", "＜pad＞", "</</s>s>"]
TEXTS = st.lists(
    st.one_of(
        st.sampled_from(ALL_NAMES),
        st.text(LETTERS, max_size=6),
        st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=3),
    )
).map("".join)
KNOWN = st.lists(st.one_of(st.sampled_from(ALL_NAMES[:-2]), st.text(LETTERS.strip(), max_size=6))).map("".join)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_no_special_id_comes_from_a_text(kind: str, data: st.DataObject) -> None:
    tokenizer, lossless = KINDS[kind]
    encoder = PlainTextEncoder(tokenizer)
    special = special_ids(tokenizer) - {encoder.unknown_id}
    assert special == set(tokenizer.all_special_ids) - {encoder.unknown_id}
    text = data.draw(TEXTS, "text")
    ids = encode_document(tokenizer, text)
    assert ids[-1] == tokenizer.eos_token_id and special.isdisjoint(ids[:-1])
    if lossless:
        assert encoder.unknown_id not in ids
        assert tokenizer.decode(ids[:-1]).lstrip(" ") == text.lstrip(" ")  # Metaspace adds a leading space to some
    known = data.draw(KNOWN, "text of known characters")
    ids = encode_document(tokenizer, known)[:-1]
    assert special.isdisjoint(ids)
    if kind.startswith("Unigram"):  # where no character is unknown, "<unk>" itself is no unknown token
        assert encoder.unknown_id not in ids
        assert tokenizer.decode(ids) == known


@pytest.mark.parametrize("kind", KINDS)
def test_texts_without_such_names_are_encoded_as_ever(kind: str) -> None:
    tokenizer = KINDS[kind][0]
    for text in ["", "the quick brown fox", "a < b > c </ s", "日本 é\n\t x", "  spaces  "]:
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert encode_document(tokenizer, text) == [*ids, tokenizer.eos_token_id]


def test_the_kinds_need_it() -> None:
    """What transformers alone makes of these names."""
    guilty = set()
    for kind, (tokenizer, _) in KINDS.items():
        for name in ALL_NAMES:
            ids = tokenizer(f"the {name} dog", add_special_tokens=False, split_special_tokens=True)["input_ids"]
            if not (special_ids(tokenizer) - {PlainTextEncoder(tokenizer).unknown_id}).isdisjoint(ids):
                guilty.add(kind)
    assert guilty == set(KINDS) - {"byte-level BPE, trained", "WordPiece, BERT's"}


def save_with(tokenizer: PreTrainedTokenizerFast, folder: Path, change: Callable[[dict], object]) -> Path:
    tokenizer.save_pretrained(folder)
    definition = json.loads((folder / "tokenizer.json").read_text())
    change(definition)
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    return folder


def test_a_template_and_an_added_token_that_says_it_is_not_special(tmp_path: Path) -> None:
    def change(definition: dict) -> None:
        for token in definition["added_tokens"]:
            token["special"] = False

    tokenizer = load_tokenizer(save_with(unigram(), tmp_path / "tokenizer", change))
    assert encode_document(tokenizer, "the</s>") == encode_document(unigram(), "the</s>")


def test_unknown_characters_are_counted(tmp_path: Path) -> None:
    unigram().save_pretrained(tmp_path / "tokenizer")
    file = lines(tmp_path / "x.jsonl", "the 日 dog 日", "<unk> is text", "the end", "日")
    manifests = prepare([file], tmp_path / "out", str(tmp_path / "tokenizer"), "text", 0.25, tmp_path / "held")
    assert sum(manifest.source["unknown_tokens"] for manifest in manifests) == 3
    tokens = sum(manifest.tokens for manifest in manifests)
    told = summary([tmp_path / "out", tmp_path / "held"], manifests)
    assert f"unknown to the tokenizer: 3 of {tokens} tokens are its unknown token" in told


def lines(path: Path, *texts: str) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def test_a_special_token_that_is_a_character_is_refused_by_place(tmp_path: Path) -> None:
    tokenizer = byte_level_bpe()
    tokenizer.pad_token = "!"
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    file = lines(tmp_path / "x.jsonl", "fine", "also fine", "stop!")
    reason = r"x\.jsonl, line 3: '!' becomes the special token pad_token '!', which this tokenizer also uses for text; "
    with pytest.raises(UserError, match=reason + "name another token for it"):
        prepare([file], tmp_path / "out", str(tmp_path / "tokenizer"))
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match=reason):  # whichever part the document is in
        prepare([file], tmp_path / "out", str(tmp_path / "tokenizer"), "text", 0.4, tmp_path / "held")


def test_an_unknown_token_that_ends_documents_is_refused() -> None:
    tokenizer = unigram()
    tokenizer.eos_token = "<unk>"
    assert encode_document(tokenizer, "the <unk>")[:-1].count(0) == 0
    with pytest.raises(UserError, match=r"document 1: '日' is unknown to the tokenizer, .*eos_token '<unk>'") as caught:
        list(encode_documents(tokenizer, ["the", "the 日 dog"]))
    assert "\n" not in str(caught.value)


def test_strange_pieces_in_data(tmp_path: Path) -> None:
    """Through files and back: the inputs of a report."""
    unigram().save_pretrained(tmp_path / "tokenizer")
    texts = ["before <s>struck out</s> after", "a cell with <pad> in it", "second document"]
    prepare([lines(tmp_path / "x.jsonl", *texts)], tmp_path / "out", str(tmp_path / "tokenizer"))
    documents = ShardedDocuments(tmp_path / "out")
    tokenizer = documents.load_tokenizer()
    assert [tokenizer.decode(document[:-1]) for document in iter(documents)] == texts
