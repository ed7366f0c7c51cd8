"""What `--init-from` starts a run with, from a folder of Hugging Face and from what was imported."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.random_models import write_random_model
from tests.ranks import run_ranks
from tidar_megatron.config import CONFIG_FILE, build_config, load_config
from tidar_megatron.data.prepare import prepare
from tidar_megatron.data.sources import tokenizer_of
from tidar_megatron.data.tokenizer import byte_tokenizer
from tidar_megatron.distributed.groups import shut_down
from tidar_megatron.errors import UserError
from tidar_megatron.huggingface.convert import export_run, import_run
from tidar_megatron.huggingface.origin import open_origin
from tidar_megatron.training.loop import pretrain
from tidar_megatron.training.resolve import resolve
from tidar_megatron.training.trainer import Trainer


def starting_from(folder, shards, **more):
    return {
        "data": {"train_data": str(shards[0]), "seq_length": 32},
        "training": {"init_from": str(folder), "global_batch_size": 4, "train_iters": 2},
        "tidar": {"block_size": 4},
        **more,
    }


def starting_anew(shards):
    model = {"num_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "ffn_hidden_size": 48}
    tree = starting_from("", shards, model=model)
    return {**tree, "training": {"global_batch_size": 4, "train_iters": 1}}


def starts_from(folder, shards, **tidar):
    tree = starting_from(folder, shards, tidar={"block_size": 4, **tidar})
    trainer = Trainer.build(build_config(tree))
    weights = {name: p.detach().clone() for name, p in trainer.model[0].named_parameters()}
    trainer.close()
    shut_down()
    return trainer.config, weights


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3-tied", "llama-untied-llama3", "qwen3_moe-untied"])
def test_a_run_starts_alike_from_the_folder_and_from_what_was_imported(imported, shards, name):
    one, two = (starts_from(imported / name / kind, shards) for kind in ("hf", "run"))
    assert one[0].model == two[0].model
    assert one[1].keys() == two[1].keys()
    assert all(torch.equal(one[1][key], two[1][key]) for key in one[1])


def test_layouts_are_checked_against_the_folders_model(imported, shards):
    """4 layers and 4 heads are the folder's; the flags' defaults divide by 3."""
    tree = starting_from(imported / "qwen3-tied" / "hf", shards)
    fits = build_config({**tree, "parallel": {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}})
    tokenizer = tokenizer_of(fits.data.train_data).entry
    origin = open_origin(fits.training.init_from)
    assert resolve(fits, tokenizer, origin).model.num_layers == 4
    for refused in ("tensor_model_parallel_size", "pipeline_model_parallel_size"):
        config = build_config({**tree, "parallel": {refused: 3}})
        with pytest.raises(UserError, match=rf"--{refused.replace('_', '-')} 3"):
            resolve(config, tokenizer, origin)


@pytest.mark.slow
def test_what_the_folder_said_outlives_moves(imported, shards, tmp_path, capsys):
    """A run continued in another folder still exports the architecture that it was imported from."""
    one, two = (str(tmp_path / name) for name in ("one", "two"))
    tree = starting_from(imported / "mistral-untied" / "hf", shards, checkpoint={"save": one})
    pretrain(build_config(tree))
    assert f"starting from the weights of {imported / 'mistral-untied' / 'hf'}" in capsys.readouterr().out
    goes_on = {"training": {"init_from": None, "train_iters": 3}, "checkpoint": {"load": one, "save": two}}
    pretrain(load_config(Path(one) / CONFIG_FILE, goes_on))
    # the same folder by another spelling
    goes_on = {
        "training": {"train_iters": 4},
        "checkpoint": {"load": two, "save": f"{tmp_path}/../{tmp_path.name}/two"},
    }
    pretrain(load_config(Path(two) / CONFIG_FILE, goes_on))
    export_run(two, tmp_path / "hf")
    shut_down()
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("mistral", ["MistralForCausalLM"])


def test_a_reserved_id_is_the_mask_token_over_a_restart(shards, tmp_path):
    """A run that is continued by its flags alone, its mask token an id that the tokenizer reserves."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<|reserved_special_token_0|>"], special_tokens=True)
    tokenizer.save_pretrained(str(tmp_path / "tokenizer"))
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(f'"{line} and so on"\n' for line in range(40)))
    prepare(inputs=[texts], output=tmp_path / "data", tokenizer_spec=str(tmp_path / "tokenizer"))
    run = str(tmp_path / "run")
    tree = {
        "data": {"train_data": str(tmp_path / "data"), "seq_length": 32},
        "model": {"num_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "ffn_hidden_size": 16},
        "training": {"global_batch_size": 2, "train_iters": 2},
        "tidar": {"block_size": 4, "mask_token_id": 257},
        "checkpoint": {"save": run, "load": run},
    }
    pretrain(build_config(tree))
    tree["training"]["train_iters"] = 3
    trainer = Trainer.build(build_config(tree))
    found = trainer.iteration, trainer.config.tidar.mask_token_id
    trainer.close()
    shut_down()
    assert found == (2, 257)


def test_data_prepared_with_an_exports_tokenizer_continue_it(shards, tmp_path):
    """The tokenizer knows the mask token's name, and no text has it."""
    pretrain(build_config({**starting_anew(shards), "checkpoint": {"save": str(tmp_path / "run")}}))
    export_run(tmp_path / "run", tmp_path / "hf")
    texts = tmp_path / "texts.jsonl"
    texts.write_text('"some <|mask|> text of no more than a few words"\n' * 20)
    prepare([texts], tmp_path / "data", str(tmp_path / "hf"))
    config, weights = starts_from(tmp_path / "hf", [tmp_path / "data"])
    assert (config.tidar.mask_token_id, config.model.vocab_size) == (257, 258)
    exported = load_file(tmp_path / "hf" / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(weights["embedding.word_embeddings.weight"][257], exported[257])


def test_what_was_imported_is_no_run_to_go_on_with(imported, shards):
    tree = {"data": {"train_data": str(shards[0]), "seq_length": 32}}
    run = imported / "qwen3-tied" / "run"
    config = build_config({**tree, "checkpoint": {"load": str(run)}, "training": {"init_from": str(run)}})
    with pytest.raises(UserError, match=r"holds only a model's weights, not a run; start from them with --init-from"):
        Trainer.build(config)


@pytest.mark.parametrize("kind", ["mean", "normal", None, "keep"])
def test_the_mask_row(imported, shards, kind):
    """260 ids, the tokenizer's are 257: the mask token is row 257 of the folder."""
    source = load_file(imported / "llama-untied-llama3" / "hf" / "model.safetensors")
    config, weights = starts_from(imported / "llama-untied-llama3" / "hf", shards, init_mask_token=kind)
    assert config.tidar.mask_token_id == 257
    before, after = source["model.embed_tokens.weight"], weights["embedding.word_embeddings.weight"]
    others = torch.arange(260) != 257
    assert torch.equal(before[others], after[:260][others])
    assert not after[260:].any()
    assert torch.equal(weights["output_layer.weight"][:260], source["lm_head.weight"])
    if kind == "keep":
        assert torch.equal(before[257], after[257])
    elif kind == "mean":
        torch.testing.assert_close(after[257], before.mean(0))
    else:
        away = (after[257] - before.mean(0)) / before.std(0)
        assert 0.6 < away.std() < 1.6


def test_a_tidar_section_that_is_none_is_refused(imported, tmp_path):
    config = json.loads((imported / "qwen3-tied" / "hf" / "config.json").read_text())
    for section, said in (
        ("yes", "tidar 'yes' is not a section"),
        ({"mask_token_id": 999}, "999 is not an id below 260"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | {"tidar": section}))
        with pytest.raises(UserError, match=said):
            open_origin(tmp_path)


@pytest.mark.process
def test_a_damaged_run_is_named_by_every_rank(imported, tmp_path, shards):
    shutil.copytree(imported / "qwen3-tied" / "run", tmp_path / "run")
    file = next((tmp_path / "run").rglob("*.distcp"))
    with file.open("r+b") as stream:
        stream.seek(file.stat().st_size // 2)
        stream.write(b"damage")
    with pytest.raises(AssertionError, match=rf"--init-from .*{file.name}"):
        run_ranks(
            2, "tools/pretrain.py", "--init-from", tmp_path / "run", "--train-data", shards[0], "--seq-length", 32
        )


def test_a_new_row_cannot_be_kept(tmp_path):
    """Masks of zeros see nothing but themselves in a document's first block: their gradient would be no number."""
    hf = write_random_model(tmp_path / "hf", "llama")
    with pytest.raises(UserError, match="row 260 is all zeros, which cannot be trained; use mean or normal"):
        import_run(hf, tmp_path / "run", None, "keep", 260)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    import_run(hf, tmp_path / "run", None, "keep", 259)  # has been there
