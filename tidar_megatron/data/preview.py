"""Inspection of training data: its contents, whether it is intact, and in colour what a model will see of it."""

import copy
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerFast

from tidar_megatron.attention_mask import DOCUMENT
from tidar_megatron.data.doubled import Batch, make_batch
from tidar_megatron.data.manifest import read_manifest
from tidar_megatron.data.packing import PackedSequences, pack
from tidar_megatron.data.sources import is_pair, open_documents
from tidar_megatron.files import sha256_of
from tidar_megatron.text_stream import continuation

COLOURS = ("green", "yellow", "blue", "magenta", "cyan", "red")  # for the documents of a row, in turn
FILL, UNSUPERVISED = "dim", "underline"
_SHOWN = 200  # characters of a sample


def inspect_data(
    path: str, tokenizer: str | None, seq_length: int, block_size: int, samples: int, console: Console
) -> bool:
    """Print a description of a folder of shards or a ``.bin/.idx`` pair, with sample documents and a packed sequence.

    Args:
        path: The folder of shards, or the prefix of the pair.
        tokenizer: The Hugging Face tokenizer folder of a pair.
        seq_length: S, of the packed sequence that is shown.
        block_size: B, of the packed sequence that is shown.
        samples: The number of sample documents.
        console: The console to print to.

    Returns:
        Whether the data are intact. If not, damage is reported shard by shard, and nothing is decoded.

    Raises:
        UserError: There is no manifest, the pair is damaged, or the lengths do not fit.
    """
    if not is_pair(path) and not _show_shards(path, console):
        return False
    documents = open_documents(path, tokenizer)
    loaded = documents.load_tokenizer()
    about = documents.tokenizer
    console.print(
        f"{documents.name}: {len(documents):,} documents, {documents.tokens:,} tokens; tokenizer {about.spec}: "
        f"{about.vocab_size:,} ids, EOS {about.eos_token_id}, fingerprint {about.fingerprint[:12]}",
        markup=False,
        soft_wrap=True,
    )
    for name, value in documents.identity.items():
        console.print(f"{name} {value}", markup=False, soft_wrap=True)
    for sample in range(samples):  # spread over the data
        number = sample * len(documents) // samples
        text = _printable(loaded.decode(documents[number][: _SHOWN + 1].tolist()))
        cut = len(documents[number]) > _SHOWN + 1 or len(text) > _SHOWN
        more = f" ... ({len(documents[number]):,} tokens)" if cut else ""
        console.print(f"document {number:,}: {text[:_SHOWN]}{more}", markup=False, soft_wrap=True)
    packed = PackedSequences(documents.index, seq_length, block_size, seed=0)
    row = pack(packed.pieces(0, 0), documents, about.eos_token_id)
    _show_row(make_batch([row], block_size, about.vocab_size), block_size, loaded, console)
    return True


def _show_shards(folder: str, console: Console) -> bool:
    """Print a table with a row for each shard, and return whether all shards match the manifest."""
    manifest, intact = read_manifest(folder), True
    table = Table("shard", "documents", "tokens", "bytes", "SHA-256", title=Text(_printable(folder)))
    for shard in manifest.shards:
        file = Path(folder) / shard.name
        try:
            state = "ok" if sha256_of(file) == shard.sha256 else "differs from the manifest's"
        except OSError as error:
            state = error.strerror or "cannot be read"
        intact &= state == "ok"
        style = "" if state == "ok" else "bold red"
        table.add_row(shard.name, f"{shard.documents:,}", f"{shard.tokens:,}", f"{shard.bytes:,}", state, style=style)
    console.print(table)
    if not intact:
        console.print("damaged: copy the folder again, or prepare the data again with --overwrite")
    strays = sorted(file.name for file in Path(folder).glob("*.tar"))
    if strays := [name for name in strays if name not in {shard.name for shard in manifest.shards}]:
        console.print(
            f"not in the manifest, so not read: {_printable(', '.join(strays[:5]))}", markup=False, soft_wrap=True
        )
    return intact


def _show_row(batch: Batch, block_size: int, tokenizer: PreTrainedTokenizerFast, console: Console) -> None:
    """Print one packed sequence as the model sees it: the clean half, then the label of each mask."""
    S, document = batch.seq_length, batch.visibility[0, :, DOCUMENT].tolist()
    tokens, labels = batch.tokens[0].tolist(), batch.labels[0].tolist()
    supervised, padding = batch.supervised[0].tolist(), batch.padding[0].tolist()
    console.print(
        f"packed sequence 0 of epoch 0 (seed 0): {S} clean tokens, {sum(padding[:S])} of them fill; parts of "
        f"documents, or fill at the end: {document[S - 1] + 1}; {batch.mask_length} masks in "
        f"{batch.mask_length // block_size} blocks of {block_size}; supervised: {batch.ar_tokens} next tokens, "
        f"{batch.diffusion_tokens} masks",
        soft_wrap=True,
    )
    legend = Text("a colour for each document; ")
    legend.append("fill", FILL).append("; ").append("not supervised", UNSUPERVISED).append("; | ends a block")
    console.print(legend)
    plain = copy.copy(tokenizer)
    plain.clean_up_tokenization_spaces = False  # otherwise a removed space would be shown at another token
    for name, half, shown in (("clean", range(S), tokens), ("masks give", range(S, len(tokens)), labels)):
        line = Text().append(f"{name}: ", "bold")
        before: list[int] = []  # a token's text depends on earlier tokens: a leading space, part of a character
        for place in half:
            token = shown[place] if not padding[place] else tokens[place % S]
            styles = [COLOURS[document[place] % len(COLOURS)]]
            styles += [FILL] * padding[place] + [UNSUPERVISED] * (not supervised[place])
            line.append(_printable(continuation(plain, before, [token], skip_special_tokens=False)), " ".join(styles))
            if (place + 1) % block_size == 0:
                line.append("|", "bold")
            before = [*before[-3:], token]
        console.print(line, soft_wrap=True)


def _printable(text: str) -> str:
    """Return the text with control characters escaped, so that a document cannot control the terminal."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)
