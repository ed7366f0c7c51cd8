"""A tokenizer with added tokens that the model has no rows for: import and --init-from give it these rows."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.checkpoint.test_init_from import starting_from, starts_from
from tests.random_models import write_random_model
from tidar_megatron.config import build_config
from tidar_megatron.data.prepare import prepare
from tidar_megatron.data.tokenizer import byte_tokenizer, rows_needed
from tidar_megatron.distributed.groups import shut_down
from tidar_megatron.errors import UserError
from tidar_megatron.huggingface.convert import export_run, import_run, verify
from tidar_megatron.training.loop import pretrain

ROWS, EXTRA = 258, 3  # the byte tokenizer's 257 ids and a row of padding; ids 257 to 260 are added
VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A folder whose tokenizer has 261 ids and whose model has 258, and data that were prepared with it."""
    folder = tmp_path_factory.mktemp("added")
    write_random_model(folder / "hf", "llama", tie=False, vocab_size=ROWS)
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([f"<extra {n}>" for n in range(4)])
    tokenizer.save_pretrained(str(folder / "hf"))
    (folder / "texts.jsonl").write_text('"some <extra 3> text of no more than a few words"\n' * 20)
    prepare([folder / "texts.jsonl"], folder / "data", str(folder / "hf"))
    return folder


def resized(folder):
    """The rows as transformers grows them: its mean, without the noise that it adds (1e-9 of the covariance)."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.resize_token_embeddings(ROWS + EXTRA, mean_resizing=True)
    return model.get_input_embeddings().weight.detach(), model.get_output_embeddings().weight.detach()


@pytest.mark.slow
def test_a_run_starts_from_it_and_its_export_has_the_rows(source, tmp_path, capsys):
    embedding, head = resized(source / "hf")
    config, weights = starts_from(source / "hf", [source / "data"])
    assert (config.tidar.mask_token_id, config.model.vocab_size) == (261, 262)
    torch.testing.assert_close(weights["embedding.word_embeddings.weight"][:261], embedding, atol=1e-4, rtol=0)
    torch.testing.assert_close(weights["output_layer.weight"][:261], head, atol=1e-4, rtol=0)
    assert weights["embedding.word_embeddings.weight"][:262].any(1).all()
    run, hf = tmp_path / "run", tmp_path / "hf"
    pretrain(build_config(starting_from(source / "hf", [source / "data"], checkpoint={"save": str(run)})))
    assert "/hf, with 4 new rows in a vocabulary of 262 ids" in capsys.readouterr().out
    export_run(run, hf)
    shut_down()
    assert json.loads((hf / "config.json").read_text())["vocab_size"] == 262
    exported = load_file(hf / "model.safetensors")
    assert [len(exported[name]) for name in VOCABULARY] == [262, 262]
    starts_from(hf, [source / "data"])  # nothing is left to grow


@pytest.mark.slow
def test_an_import_has_the_rows_too(source, tmp_path):
    config = import_run(source / "hf", tmp_path / "run")
    assert (config.tidar.mask_token_id, config.model.vocab_size) == (None, 261)
    export_run(tmp_path / "run", tmp_path / "hf")
    after = load_file(tmp_path / "hf" / "model.safetensors")
    before = load_file(source / "hf" / "model.safetensors")
    for name, grown in zip(VOCABULARY, resized(source / "hf"), strict=True):
        assert torch.equal(after[name][:ROWS], before[name])
        torch.testing.assert_close(after[name], grown, atol=1e-4, rtol=0)
    found = verify(source / "hf", tmp_path / "run")
    assert found["max_logit_difference"] <= 1e-4
    assert (found["new_rows"], found["left_out"]) == (EXTRA, None)
    with_mask = import_run(source / "hf", tmp_path / "masked", None, "normal")
    assert (with_mask.tidar.mask_token_id, with_mask.model.vocab_size) == (261, 262)
    found = verify(source / "hf", tmp_path / "masked")
    assert found["max_logit_difference"] <= 1e-4
    assert (found["new_rows"], found["left_out"]) == (EXTRA + 1, 261)
    # and a run starts from what was imported as from the folder
    folders = (source / "hf", tmp_path / "run")
    one, two = (starts_from(folder, [source / "data"], init_mask_token="mean") for folder in folders)
    assert one[0].model == two[0].model
    for name in one[1]:
        torch.testing.assert_close(one[1][name], two[1][name])


def test_a_mask_row_that_was_learned_stays(source, tmp_path):
    """Where the folder has a ``tidar`` section and its tokenizer got tokens afterwards."""
    hf = write_random_model(tmp_path / "hf", "llama", vocab_size=ROWS, tidar={"mask_token_id": 257, "block_size": 4})
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<|mask|>", "<extra>"])
    tokenizer.save_pretrained(str(hf))
    (tmp_path / "texts.jsonl").write_text('"some <extra> text of no more than a few words"\n' * 20)
    prepare([tmp_path / "texts.jsonl"], tmp_path / "data", str(hf))
    config, weights = starts_from(hf, [tmp_path / "data"])
    before = load_file(hf / "model.safetensors")["model.embed_tokens.weight"]
    assert (config.tidar.mask_token_id, config.model.vocab_size) == (257, 259)
    after = weights["embedding.word_embeddings.weight"]
    assert torch.equal(after[:ROWS], before)
    torch.testing.assert_close(after[ROWS], before.mean(0))


def test_data_of_a_larger_tokenizer_are_still_refused(source, tmp_path):
    hf = write_random_model(tmp_path / "hf", "llama", vocab_size=ROWS)
    with pytest.raises(UserError, match=r"258 ids are fewer than the 261 of the data's tokenizer"):
        starts_from(hf, [source / "data"])
    byte_tokenizer().save_pretrained(str(hf))
    assert rows_needed(hf, ROWS) == ROWS
    with pytest.raises(UserError, match=r"258 ids are fewer than the 261 .* prepare the data with the model's own"):
        starts_from(hf, [source / "data"])


def test_decoding_says_that_the_model_lacks_the_row(source):
    from tidar_megatron.inference.engine import generate
    from tidar_megatron.inference.loading import load_model

    model = load_model(source / "hf")
    with pytest.raises(UserError, match=r"token id 260 .* 261 ids, including '<extra 3>'; add the missing rows"):
        generate(model, model.tokenizer.encode("a<extra 3>"))
    with pytest.raises(UserError, match=r"token id 261 .*: use the tokenizer of the same folder"):
        generate(model, [261])
