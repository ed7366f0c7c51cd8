"""A model's own text: prompts are continued in large batches, recorded as they end, and written as shards.

Drafts learn best from what the model itself writes. The record is a file of JSON lines, so a killed run goes on where
it was; the shards are written from the record, so they do not depend on when it was killed.

The shards are marked: only the model's own tokens are supervised. The prompt is not, nor is the end-of-sequence token
of a text that was cut, which it gets because every document of shards ends with one. A small model's greedy text often
falls into a loop, which teaches a draft little; it may be cut so that most of its 4-grams are distinct
(:func:`varied_part`).
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tidar_megatron.adapter import weights_hash
from tidar_megatron.data.manifest import Manifest
from tidar_megatron.data.shard_writer import MarkedDocument, check_output, write_shards
from tidar_megatron.data.shards import ShardedDocuments
from tidar_megatron.data.tokenizer import vocabulary_size
from tidar_megatron.errors import UserError
from tidar_megatron.inference.engine import Engine
from tidar_megatron.inference.model import DecodeModel
from tidar_megatron.inference.request import DecodeOptions
from tidar_megatron.inference.sequence import Sequence as Decoding


@dataclass(frozen=True)
class OwnText:
    """The continuation of one prompt.

    Attributes:
        number: The prompt's place in the list.
        prompt: Its token ids.
        output: The token ids of the continuation.
        stop: Why it ended: ``eos``, ``length``, ``context`` or ``stop``.
    """

    number: int
    prompt: list[int]
    output: list[int]
    stop: str


def write_own_text(
    model: DecodeModel,
    base: str | Path,
    prompts: Sequence[Sequence[int]],
    options: DecodeOptions,
    record: Path,
    batch_size: int = 64,
    say: Callable[[str], None] = lambda text: None,
) -> list[OwnText]:
    """Continue the prompts that a record does not hold yet, and return all texts in the order of the prompts.

    With a seed, prompt n draws with the seed plus n, whatever batch it is in.

    Args:
        model: The model.
        base: The model's folder.
        prompts: Token ids.
        options: How to generate.
        record: The file of JSON lines; a line is added as soon as a text ends.
        batch_size: Texts that are generated together.
        say: A function that is called with a line of progress now and then.

    Raises:
        UserError: The record is that of other prompts, options or weights, or cannot be written.
    """
    about = {"weights": weights_hash(base), "options": _plain(options), "prompts": _digest(prompts)}
    done = {text.number: text for text in _read(record, about)}
    if done:
        say(f"{record}: {len(done):,} of {len(prompts):,} texts are there already")
    waiting = {}
    for number in range(len(prompts)):
        if number not in done:
            waiting[number] = Decoding(model, prompts[number], _seeded(options, number))
    if not waiting:
        return [done[number] for number in range(len(prompts))]
    engine = Engine(model, batch_size, max(one.room for one in waiting.values()), queue_size=len(waiting))
    numbers = {engine.enqueue(one): number for number, one in waiting.items()}
    try:
        with record.open("a", encoding="utf-8") as lines:
            while not engine.is_idle:
                for sequence, step in engine.step():
                    if sequence.error is not None:
                        raise sequence.error
                    if step.stop is None:
                        continue
                    number = numbers[sequence]
                    text = OwnText(number, list(prompts[number]), sequence.tokens, str(step.stop))
                    done[number] = text
                    lines.write(json.dumps(asdict(text)) + "\n")
                    lines.flush()
                    if len(done) % 100 == 0:
                        say(f"{len(done):,} of {len(prompts):,} texts")
    except OSError as error:
        raise UserError(f"{record}: {error.strerror}; choose another --output") from None
    return [done[number] for number in range(len(prompts))]


def _seeded(options: DecodeOptions, number: int) -> DecodeOptions:
    sampling = options.sampling
    if sampling.seed is None:
        return options
    return replace(options, sampling=replace(sampling, seed=sampling.seed + number))


def _plain(options: DecodeOptions) -> dict[str, Any]:
    given: dict[str, Any] = json.loads(json.dumps(asdict(options)))
    return given


def _digest(prompts: Sequence[Sequence[int]]) -> str:
    return hashlib.sha256(json.dumps([list(prompt) for prompt in prompts]).encode()).hexdigest()


def _read(record: Path, about: dict[str, Any]) -> Iterator[OwnText]:
    """Yield the texts of a record, or begin it; a line that a killed run has cut is removed.

    Nothing is written to a file that is not a record of this run.
    """
    header = json.dumps(about) + "\n"
    try:
        whole = record.read_bytes() if record.exists() else b""
        if header.encode().startswith(whole):  # a new file, or a header that was cut
            record.parent.mkdir(parents=True, exist_ok=True)
            record.write_text(header, encoding="utf-8")
            return
        complete = whole[: whole.rfind(b"\n") + 1]
        first, *lines = complete.decode().splitlines() or [""]
        before = json.loads(first)
        if not isinstance(before, dict) or before.keys() != about.keys():
            raise ValueError
        for name, value in about.items():
            if before[name] != value:
                raise UserError(f"{record}: was begun with other {name}; choose another --output")
        texts = [OwnText(**json.loads(line)) for line in lines]
        if len(complete) < len(whole):
            record.write_bytes(complete)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{record}: {error.strerror}; choose another --output") from None
    except (ValueError, TypeError):
        raise UserError(f"{record}: is not a record of own text; choose another --output") from None
    yield from texts


def write_own_shards(
    model: DecodeModel,
    base: str | Path,
    texts: Sequence[OwnText],
    folders: Sequence[str | Path],
    held_out: int = 0,
    overwrite: bool = False,
    least_distinct: float = 0.0,
) -> list[Manifest]:
    """Write texts as shards: the first folder gets those to train on, a second one the last ``held_out`` of them.

    Args:
        model: The model.
        base: The model's folder.
        texts: The texts.
        folders: One folder, or two.
        held_out: The number of texts for the second folder.
        overwrite: Whether to replace shards that are there.
        least_distinct: The least fraction of distinct 4-grams; a continuation is cut where it has fewer.

    Raises:
        UserError: A folder must not be written to, or no text is left to train on.
    """
    for folder in folders:
        check_output(folder, overwrite)
    if held_out >= len(texts):
        raise UserError(f"{held_out} texts are held out of {len(texts)}, so none is left to train on; add prompts")
    parts = [texts[: len(texts) - held_out], texts[len(texts) - held_out :]]
    manifests = []
    for folder, part, name in zip(folders, parts, ("training", "held-out"), strict=False):
        ids, end = vocabulary_size(model.tokenizer), model.tokenizer.eos_token_id
        documents = [_document(text, ids, end, least_distinct) for text in part]
        spec = Path(base).resolve().name
        own = sum(sum(document.supervised) for document in documents)
        if not own:
            raise UserError(f"{folder}: none of the {name} texts has a token of the model's own; give other prompts")
        source = {"part": name, "own_text_of": spec, "own_tokens": own, "least_distinct": least_distinct}
        manifests.append(
            write_shards(folder, documents, model.tokenizer, spec, source, overwrite=overwrite, marked=True)
        )
        ShardedDocuments(folder)  # read and check all shards, and write the index that training needs
    return manifests


def varied_part(tokens: Sequence[int], least_distinct: float) -> Sequence[int]:
    """Return the longest beginning whose fraction of distinct 4-grams is at least ``least_distinct``."""
    seen, kept = set(), min(len(tokens), 3)
    for count, gram in enumerate(zip(*(tokens[i:] for i in range(4)), strict=False), start=1):
        seen.add(gram)
        if len(seen) >= least_distinct * count:
            kept = count + 3
    return tokens[:kept]


def _document(text: OwnText, ids: int, end: int, least_distinct: float) -> MarkedDocument:
    """Return a text up to the first token that is none of the tokenizer's, as rows of padding are, and its end."""

    def known(tokens: Sequence[int]) -> list[int]:
        return list(tokens[: next((place for place, token in enumerate(tokens) if token >= ids), len(tokens))])

    prompt, output = known(text.prompt), []
    if len(prompt) == len(text.prompt):
        output = known(varied_part(text.output, least_distinct))
    marks = [False] * len(prompt) + [True] * len(output)
    whole = prompt + output
    return MarkedDocument(whole, marks) if output[-1:] == [end] else MarkedDocument([*whole, end], [*marks, False])
