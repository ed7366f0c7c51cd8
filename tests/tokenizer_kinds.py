"""Small tokenizers of every kind that a causal language model has, for what turns token ids into text."""

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<s>", "</s>", "<|im_end|>"]
WORDS = ["the", "The", "qu", "ick", "fox", "jump", "s", "n", "'", "'t", "'s", "'ve", ".", ",", "?", "!", "a", "é", "日"]


def _wrap(tokenizer: Tokenizer, **options: object) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.add_tokens([AddedToken("<tool>", special=False)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", **options)


def _numbered(tokens: list[str]) -> dict[str, int]:
    return {token: number for number, token in enumerate(dict.fromkeys(tokens))}


def byte_level(**options: object) -> PreTrainedTokenizerFast:
    """GPT-2's and most of today's: bytes and some words, U+FFFD as a character that a text may hold."""
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words = [" ", *WORDS, *(f" {word}" for word in WORDS), "\N{REPLACEMENT CHARACTER}", "🙂"]
    as_bytes = [level.pre_tokenize_str(word)[0][0] for word in words]
    tokenizer = Tokenizer(models.BPE(vocab=_numbered([*sorted(level.alphabet()), *as_bytes]), merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = level, decoders.ByteLevel()
    return _wrap(tokenizer, **options)


def _sentencepiece_words() -> list[str]:
    words = [*WORDS, *(f"▁{word}" for word in WORDS), "▁", "▁▁", "▁▁▁▁", "\N{REPLACEMENT CHARACTER}"]
    return ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]


def byte_fallback(strip: bool = True) -> PreTrainedTokenizerFast:
    """Llama 2's; without ``strip`` Gemma's."""
    tokenizer = Tokenizer(models.BPE(vocab=_numbered(_sentencepiece_words()), merges=[], byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strip else steps)
    return _wrap(tokenizer)


def unigram(byte_fallback: bool = False, **options: object) -> PreTrainedTokenizerFast:
    """T5's and XLNet's."""
    pieces = [(word, -1.0) for word in dict.fromkeys(_sentencepiece_words())]
    tokenizer = Tokenizer(models.Unigram(pieces, 0, byte_fallback))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    metaspace = decoders.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), metaspace]) if byte_fallback else metaspace
    return _wrap(tokenizer, **options)


def word_piece(**options: object) -> PreTrainedTokenizerFast:
    """BERT's."""
    words = _numbered(["[UNK]", *WORDS, *(f"##{word}" for word in WORDS)])
    tokenizer = Tokenizer(models.WordPiece(words, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece(cleanup=bool(options))
    return _wrap(tokenizer, **options)


def suffixed() -> PreTrainedTokenizerFast:
    """GPT-1's: a word ends with a suffix."""
    words = _numbered([*WORDS, *(f"{word}</w>" for word in WORDS), "</w>"])
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[], end_of_word_suffix="</w>"))
    tokenizer.decoder = decoders.BPEDecoder(suffix="</w>")
    return _wrap(tokenizer)


def words() -> PreTrainedTokenizerFast:
    """No decoder: tokens are joined by spaces."""
    return _wrap(Tokenizer(models.WordLevel(_numbered(["[UNK]", *WORDS]), unk_token="[UNK]")))


FORCED = {"clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output": True}
CLEAN = {"clean_up_tokenization_spaces": True}
KINDS = {
    "byte-level": byte_level(),
    "byte-level, clean-up asked for": byte_level(**CLEAN),
    "byte-level, clean-up forced": byte_level(**CLEAN, **FORCED),
    "byte fallback": byte_fallback(),
    "byte fallback, no strip": byte_fallback(strip=False),
    "unigram": unigram(),
    "unigram, byte fallback": unigram(byte_fallback=True),
    "unigram, clean-up": unigram(**CLEAN),
    "word piece": word_piece(),
    "word piece, clean-up": word_piece(**CLEAN),
    "suffix": suffixed(),
    "no decoder": words(),
}
