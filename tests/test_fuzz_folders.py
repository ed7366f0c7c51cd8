"""Every key of every JSON file that is read from a folder, with every value that it cannot have.

Whatever is in a file, the tools' functions give a valid result or one line that names the file or the key; never a
traceback, a hang, or more than 1 GiB. ``make test`` draws a sample that covers every file and every value;
``make test-slow`` takes all of them.
"""

import hashlib
import json
import os
import random
import shutil
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from tests.mutations import VALUES, Mutation, mutations, outcome
from tidar_megatron.checkpoint.contents import read_state
from tidar_megatron.checkpoint.folder import restart_points
from tidar_megatron.checkpoint.integrity import FILE_NAME, Manifest, seal
from tidar_megatron.checkpoint.summary import describe, inspect
from tidar_megatron.config import load_config
from tidar_megatron.data.index import _TRAILER
from tidar_megatron.data.shards import INDEX_FILE, ShardedDocuments
from tidar_megatron.data.tokenizer import byte_tokenizer, load_tokenizer
from tidar_megatron.evaluation.stock import load_stock
from tidar_megatron.huggingface.convert import export_run, import_run
from tidar_megatron.inference.engine import generate
from tidar_megatron.inference.loading import load_model
from tidar_megatron.inference.request import parse_plan
from tidar_megatron.inference.text import continuation, encode_prompt

FULL = os.environ.get("HYPOTHESIS_PROFILE") == "thorough"
SAMPLE = 10  # of the mutations of one file, in make test: every value once

# keys that a real folder may have and that ours leave out
MORE = {
    "quantization_config": None, "sliding_window": None, "layer_types": ["full_attention"] * 2,
    "torch_dtype": "float32", "rope_scaling": None, "tie_word_embeddings": False, "transformers_weights": None,
}  # fmt: skip
TOKENS_MAP = {"eos_token": "<|endoftext|>", "additional_special_tokens": []}
SIZES = {
    "vocab_size": 258, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 64, "eos_token_id": 256, "bos_token_id": None,
    "tidar": {"mask_token_id": 257, "block_size": 4, "ar_loss_weight": 1.0, "seq_length": 32},
}  # fmt: skip


def _write(path: Path, tree: object) -> None:
    """JSON, which is YAML too; a checkpoint's manifest promises what is there, so that the content itself is read."""
    path.write_text(json.dumps(tree))
    if path.parent.name.startswith("iter_"):
        manifest = path.with_name(FILE_NAME)
        try:
            known = Manifest.model_validate_json(manifest.read_text())
            files = dict(known.files)
            if path.name in files:
                files[path.name] = seal(path)
            known = known.model_copy(update={"files": files})
            manifest.write_text(known.model_copy(update={"sha256": known.digest()}).model_dump_json())
        except ValueError:  # it is the manifest that is mutated, into none
            pass


def _model_folder(folder: Path, config: object, kind: type) -> Path:
    torch.manual_seed(0)
    model = kind(config)
    model.generation_config.suppress_tokens = [257]
    model.save_pretrained(folder, max_shard_size="20kB")
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<|mask|>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    content = json.loads((folder / "config.json").read_text())
    _write(folder / "config.json", {**{key: MORE[key] for key in MORE if key not in content}, **content})
    _write(folder / "special_tokens_map.json", TOKENS_MAP)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory, shards):
    """Sound folders: exported models of three architectures, an imported run, shards."""
    base = tmp_path_factory.mktemp("sound")
    moe = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "norm_topk_prob": True}
    qwen = {key: value for key, value in MORE.items() if key in ("sliding_window", "layer_types")}
    made = {
        "qwen3": _model_folder(base / "qwen3", Qwen3Config(**SIZES, **qwen), Qwen3ForCausalLM),
        "llama": _model_folder(
            base / "llama",
            LlamaConfig(**SIZES, rope_parameters={"rope_type": "llama3", "rope_theta": 1e4, "factor": 2.0,
                        "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}),
            LlamaForCausalLM,
        ),
        "moe": _model_folder(base / "moe", Qwen3MoeConfig(**SIZES, **moe), Qwen3MoeForCausalLM),
        "run": base / "run",
        "shards": base / "shards",
    }  # fmt: skip
    import_run(made["qwen3"], made["run"])
    shutil.copytree(shards[0], made["shards"])
    ShardedDocuments(made["shards"])
    return made


def _generate(folder: Path) -> None:
    model = load_model(folder)
    prompt = encode_prompt(model, "hello")
    for plan in ("ar", "all:4") if model.mask_token_id is not None else ("ar",):
        generation = generate(model, prompt, replace(parse_plan(plan), max_new_tokens=4))
        continuation(model.tokenizer, prompt, generation.token_ids)
        assert all(0 <= token < model.vocab_size for token in generation.token_ids)


def _certify(folder: Path) -> None:
    model = load_model(folder)
    stock = load_stock(folder, model)
    stock.generate(torch.tensor([[1, 2]]), max_new_tokens=2, pad_token_id=0)


def _import(folder: Path) -> None:
    target = folder.with_name("imported")
    shutil.rmtree(target, ignore_errors=True)
    import_run(folder, target)
    assert load_config(target / "resolved_config.yaml").model.vocab_size


def _export(run: Path) -> None:
    target = run.with_name("exported")
    shutil.rmtree(target, ignore_errors=True)
    export_run(run, target)
    load_model(target)


def _tokenizer(folder: Path) -> None:
    load_tokenizer(folder)


def _shards(folder: Path) -> None:
    documents = ShardedDocuments(folder)
    documents.load_tokenizer()
    assert len(documents[0])


def _inspect(checkpoint: Path) -> None:
    for folder in (checkpoint, checkpoint.parent):
        found = inspect(folder, verify=False)
        json.dumps(found), describe(found)
    read_state(checkpoint)
    restart_points(checkpoint.parent)


# what reads a file, and of which sound folder
CASES = [
    ("qwen3", "config.json", _generate),
    ("llama", "config.json", _generate),
    ("moe", "config.json", _generate),
    ("qwen3", "config.json", _certify),
    ("qwen3", "config.json", _import),
    ("qwen3", "generation_config.json", _generate),
    ("qwen3", "tokenizer_config.json", _generate),
    ("qwen3", "special_tokens_map.json", _generate),
    ("qwen3", "tokenizer.json", _tokenizer),
    ("qwen3", "tokenizer_config.json", _tokenizer),
    ("qwen3", "model.safetensors.index.json", _generate),
    ("qwen3", "model.safetensors.index.json", _import),
    ("shards", "manifest.json", _shards),
    ("run", "iter_0000000/state.json", _inspect),
    ("run", "iter_0000000/manifest.json", _inspect),
]
SLOW = [  # an import or export takes a second
    ("llama", "config.json", _import),
    ("moe", "config.json", _import),
    ("qwen3", "generation_config.json", _import),
    ("run", "resolved_config.yaml", _export),
    ("run", "huggingface/config.json", _export),
    ("run", "huggingface/generation_config.json", _export),
]


def _sample(every: list[Mutation], seed: str) -> list[Mutation]:
    """Some of them: each value at least once, and keys as different as there are."""
    if FULL:
        return every
    draw = random.Random(seed)
    draw.shuffle(every)
    chosen: list[Mutation] = []
    keys: Counter[str] = Counter()
    for kind in [*VALUES][:SAMPLE]:
        of_kind = [mutation for mutation in every if mutation.kind == kind and mutation not in chosen]
        if of_kind:
            chosen.append(min(of_kind, key=lambda mutation: keys[mutation.key]))
            keys[chosen[-1].key] += 1
    return chosen


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sound", "file", "use"), CASES + SLOW * FULL, ids=lambda value: getattr(value, "__name__", value)
)
def test_every_key_with_every_value(folders, tmp_path, monkeypatch, sound, file, use):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # which is most of an import's time
    folder = tmp_path / sound
    shutil.copytree(folders[sound], folder)
    path = folder / file
    given = path.parent if use is _inspect else folder
    assert outcome(lambda: use(given)) == "ok"
    original = path.read_text()
    tree = yaml.safe_load(original) if path.suffix == ".yaml" else json.loads(original)
    counts: Counter[str] = Counter()
    wrong, begin = [], time.perf_counter()
    for mutation in _sample(mutations(path.name, tree), f"{sound} {file} {use.__name__}"):
        mutated = mutation.apply(tree)
        _write(path, mutated)
        said = outcome(lambda: use(given), mutation)
        counts[said.split()[0]] += 1
        if said.startswith("WRONG"):
            wrong.append(f"{mutation}: {said}")
    path.write_text(original)
    print(f"{use.__name__} {sound} {file}: {dict(counts)}, {time.perf_counter() - begin:.1f} s")
    assert not wrong, "\n".join([f"{len(wrong)} of {counts.total()}", *wrong])


def test_an_index_of_documents_is_built_again(folders, tmp_path, monkeypatch):
    """What is in it may be anything: it is a cache, and sealed by its own hash."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    folder = shutil.copytree(folders["shards"], tmp_path / "shards")
    path, documents = folder / INDEX_FILE, ShardedDocuments(folder)
    before = [documents[number][:].tolist() for number in range(len(documents))]
    data = path.read_bytes()
    table, length, _, magic = _TRAILER.unpack(data[-_TRAILER.size :])
    begin = len(data) - _TRAILER.size - length
    about = json.loads(data[begin:][:length])

    def read() -> None:
        again = ShardedDocuments(folder)
        assert [again[number][:].tolist() for number in range(len(again))] == before

    for mutation in _sample(mutations(path.name, about), path.name):
        changed = json.dumps(mutation.apply(about)).encode()
        sha256 = hashlib.sha256(data[begin - table : begin] + changed).digest()
        path.unlink()
        path.write_bytes(data[:begin] + changed + _TRAILER.pack(table, len(changed), sha256, magic))
        said = outcome(read)
        assert said == "ok", f"{mutation}: {said}"
