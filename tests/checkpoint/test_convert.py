"""Hugging Face -> a run -> Hugging Face changes no bit, in any layout; what does not fit leaves nothing behind."""

import errno
import json
import math
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import normalizers

from tests import ranks
from tests.programs import own_lines
from tests.random_models import MODELS, write_random_model
from tidar_megatron.config import ParallelConfig
from tidar_megatron.data.tokenizer import byte_tokenizer, free_id, reserved_ids, train_bpe
from tidar_megatron.errors import UserError
from tidar_megatron.huggingface.convert import TOLERANCE, export_run, import_run, verify
from tidar_megatron.huggingface.folders import Safetensors
from tidar_megatron.huggingface.output_row import mask_output_row

SAME = "model_type vocab_size rms_norm_eps rope_parameters tie_word_embeddings eos_token_id dtype architectures".split()


def same_folder(before, after, untied_mask_row=None):
    """The same weights bit for bit, and the same settings; an export decides the mask row of an untied head."""
    weights = [
        {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
        for folder in (before, after)
    ]
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        if name == "lm_head.weight" and untied_mask_row is not None:
            tensor[untied_mask_row] = weights[1][name][untied_mask_row]
        assert tensor.dtype == weights[1][name].dtype and torch.equal(tensor, weights[1][name]), name
    theirs, ours = (json.loads((folder / "config.json").read_text()) for folder in (before, after))
    for key in SAME:
        assert ours.get(key) == theirs.get(key), key


@pytest.mark.parametrize("name", list(MODELS))
def test_there_and_back_changes_no_bit(imported, tmp_path, name):
    from transformers import AutoModelForCausalLM

    export_run(imported / name / "run", tmp_path / "hf")
    same_folder(imported / name / "hf", tmp_path / "hf")
    export_run(imported / name / "run", tmp_path / "small", shard_bytes=100_000)
    assert len(list((tmp_path / "small").glob("model-*.safetensors"))) > 2
    same_folder(imported / name / "hf", tmp_path / "small")
    ids = torch.arange(24)[None]
    one, two, three = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
        for folder in (imported / name / "hf", tmp_path / "hf", tmp_path / "small")
    )
    assert torch.equal(one, two)
    assert torch.equal(one, three)


@pytest.mark.parametrize("name", list(MODELS))
def test_both_sides_have_the_same_logits_and_a_changed_weight_is_seen(imported, tmp_path, name):
    source, run = imported / name / "hf", imported / name / "run"
    found = verify(source, run)
    assert found["max_logit_difference"] <= TOLERANCE
    assert found["largest_logit"] > 0.5
    shutil.copytree(source, tmp_path / "hf")
    weights = load_file(source / "model.safetensors")
    weights["model.layers.2.self_attn.k_proj.weight"][3] += 0.5
    save_file(weights, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    assert verify(tmp_path / "hf", run)["max_logit_difference"] > TOLERANCE


@pytest.mark.process
def test_through_tp2_pp2(imported, tmp_path, shards):
    """Four ranks start from what was imported, save without a step, and one process exports."""
    names = [name for name in MODELS if "moe" not in name]
    ranks.run_ranks(4, "-m", "tests.checkpoint.start_and_save", imported, tmp_path, shards[0], *names)
    for name in names:
        export_run(tmp_path / name, tmp_path / f"{name}-hf")
        mask = json.loads((tmp_path / f"{name}-hf" / "config.json").read_text())["tidar"]["mask_token_id"]
        same_folder(imported / name / "hf", tmp_path / f"{name}-hf", untied_mask_row=mask)


def test_a_vocabulary_without_a_free_row_grows_and_is_trimmed(tmp_path):
    write_random_model(tmp_path / "hf", "llama", tie=False)
    config = import_run(tmp_path / "hf", tmp_path / "run", None, "mean", 260)
    assert (config.model.vocab_size, config.tidar.mask_token_id) == (261, 260)
    export_run(tmp_path / "run", tmp_path / "out")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "out"))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert after[name].shape == (261, 64)
        assert torch.equal(after[name][:260], before[name])
    mean = before["model.embed_tokens.weight"].mean(0)
    torch.testing.assert_close(after["model.embed_tokens.weight"][260], mean)
    head = before["lm_head.weight"]  # an export decides the row of its mask token, from the one that was added
    row = mask_output_row(torch.cat([head, head.mean(0, keepdim=True)]), 260)
    torch.testing.assert_close(after["lm_head.weight"][260], row)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tidar"]["mask_token_id"] == 260
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["suppress_tokens"] == [260]


def test_which_id_is_free():
    tokenizer = byte_tokenizer()
    assert reserved_ids(tokenizer) == []
    tokenizer.add_tokens(["<|reserved_special_token_7|>", "<unused3>", "<extra>"], special_tokens=True)
    assert reserved_ids(tokenizer) == [257, 258]
    tokenizer.pad_token = "<unused3>"
    assert reserved_ids(tokenizer) == [257]
    assert free_id(257, [], 260) == 257  # a row of padding
    assert free_id(257, [], 257) == 257  # a new one
    assert free_id(260, [257, 258], 260) == 257  # no row is free: a reserved one
    assert free_id(260, [257, 258], 300) == 260


def test_a_tokenizer_comes_along(tmp_path):
    write_random_model(tmp_path / "hf", "qwen3")
    byte_tokenizer().save_pretrained(str(tmp_path / "hf"))
    config = import_run(tmp_path / "hf", tmp_path / "run", None, "mean")
    assert config.tidar.mask_token_id == 257
    export_run(tmp_path / "run", tmp_path / "out")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.encode("<|mask|>a", add_special_tokens=False) == [257, 97]


def test_the_file_that_transformers_reads_is_imported(tmp_path):
    """Whatever lies beside it: the shards and the index of an older save, a copy."""
    hf = write_random_model(tmp_path / "hf", "qwen3")
    weights = load_file(hf / "model.safetensors")
    other = {name: tensor + 1 for name, tensor in weights.items()}
    save_file(other, hf / "model_old.safetensors", metadata={"format": "pt"})
    index = {"weight_map": dict.fromkeys(other, "model_old.safetensors")}
    (hf / "model.safetensors.index.json").write_text(json.dumps(index))
    import_run(hf, tmp_path / "run")
    assert verify(hf, tmp_path / "run")["max_logit_difference"] <= 1e-4
    shutil.copy(hf / "model.safetensors", hf / "a.safetensors")
    (hf / "model.safetensors").rename(hf / "b.safetensors")
    (hf / "model.safetensors.index.json").unlink()
    with pytest.raises(UserError, match=r"is also in another file; remove one of the two files"):
        import_run(hf, tmp_path / "other")
    (hf / "model.safetensors.index.json").write_text('{"weight_map": null}')
    with pytest.raises(UserError, match=r"has no weight_map from tensors to files"):
        import_run(hf, tmp_path / "other")


def test_what_a_model_learned_of_drafting_comes_along(tmp_path):
    hf = write_random_model(tmp_path / "hf", "qwen3")
    config = json.loads((hf / "config.json").read_text())
    config["tidar"] = {"mask_token_id": 259, "block_size": 12, "ar_loss_weight": 0.5, "seq_length": 36}
    (hf / "config.json").write_text(json.dumps(config))
    import_run(hf, tmp_path / "run")
    export_run(tmp_path / "run", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tidar"] == config["tidar"]
    for wrong, said in (
        ({"block_size": "large"}, r"tidar\.block_size 'large' is not a positive integer"),
        ({"mask_token_id": 260}, r"tidar\.mask_token_id 260 is not an id below 260"),
        ({"mask_token_id": -1}, r"tidar\.mask_token_id -1 is not an id"),
    ):
        (hf / "config.json").write_text(json.dumps(config | {"tidar": config["tidar"] | wrong}))
        with pytest.raises(UserError, match=said):
            import_run(hf, tmp_path / "other")


def tool(*arguments, largest_file=None):
    return ranks.run("tools/convert_checkpoint.py", *arguments, largest_file=largest_file)


def test_a_used_id_is_no_mask_token(tmp_path):
    hf = write_random_model(tmp_path / "hf", "llama")
    byte_tokenizer().save_pretrained(str(hf))
    with pytest.raises(UserError, match="--mask-token-id 97: the tokenizer uses it"):
        import_run(hf, tmp_path / "run", None, "mean", 97)
    assert not (tmp_path / "run").exists()
    assert import_run(hf, tmp_path / "run", None, "mean", 258).tidar.mask_token_id == 258


@pytest.mark.slow
@pytest.mark.parametrize("tie", [True, False])
def test_a_mask_row_of_its_own_is_no_other_model(tmp_path, tie):
    hf = write_random_model(tmp_path / "hf", "llama", tie=tie)
    import_run(hf, tmp_path / "run", None, "normal", 258)
    export_run(tmp_path / "run", tmp_path / "out")
    import_run(hf, tmp_path / "grown", None, "normal", 260)
    for folder, run, left_out in ((hf, "run", 258), (tmp_path / "out", "run", None), (hf, "grown", 260)):
        found = verify(folder, tmp_path / run)
        assert found["max_logit_difference"] <= 1e-4
        assert found["left_out"] == left_out


def test_tensors_of_more_digits_than_the_folder_says_keep_them(tmp_path):
    hf = write_random_model(tmp_path / "hf", "llama")
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    import_run(hf, tmp_path / "run")
    export_run(tmp_path / "run", tmp_path / "out")
    before, after = (load_file(folder / "model.safetensors") for folder in (hf, tmp_path / "out"))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"


def test_an_old_buffer_does_not_make_a_bfloat16_model_another(tmp_path):
    hf = write_random_model(tmp_path / "hf", "llama", dtype=torch.bfloat16)
    weights = load_file(hf / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(weights, hf / "model.safetensors", metadata={"format": "pt"})
    assert import_run(hf, tmp_path / "run").training.bf16


def test_an_export_touches_nothing_else(imported, tmp_path):
    beside = tmp_path / "hf.partial"
    beside.mkdir()
    (beside / "mine").touch()
    export_run(imported / "llama-tied" / "run", tmp_path / "hf")
    assert (beside / "mine").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "hf.partial"]
    with pytest.raises(UserError, match=r"exists and is not empty \(mine is there\)"):
        export_run(imported / "llama-tied" / "run", beside)
    with pytest.raises(UserError, match="mine: Not a directory; choose another folder"):
        export_run(imported / "llama-tied" / "run", beside / "mine")
    with pytest.raises(UserError, match=r"--hf .*mine/hf: nothing was written \(\[Errno 20\] Not a directory"):
        export_run(imported / "llama-tied" / "run", beside / "mine" / "hf")


def test_into_the_folder_where_one_stands(tmp_path, monkeypatch):
    hf = write_random_model(tmp_path / "hf", "llama")
    for name in ("run", "out"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "run")
    import_run(hf, ".")
    monkeypatch.chdir(tmp_path / "out")
    export_run("../run", ".")
    same_folder(hf, tmp_path / "out")
    assert not list(tmp_path.glob("*/.*"))


@pytest.mark.process
def test_a_disk_that_is_full_leaves_nothing(tmp_path):
    """Full at the weights, or at the tokenizer that comes after them: each library has its own words for it."""
    hf = write_random_model(tmp_path / "hf", "llama")
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("q" * 2_000_000, "")  # longer than the weights
    tokenizer.save_pretrained(str(hf))
    import_run(hf, tmp_path / "run")
    assert 20_000 < (hf / "model.safetensors").stat().st_size < 1_900_000
    for verb, option in (("import", "--output"), ("export", "--hf")):
        source = ["--hf", hf] if verb == "import" else ["--checkpoint", tmp_path / "run"]
        for largest in (20_000, 1_900_000):
            done = tool(verb, *source, option, tmp_path / "to", largest_file=largest)
            assert (done.returncode, done.stdout) == (2, "")
            assert re.fullmatch(
                rf"error: {option} .*to: nothing was written \(\[Errno 27\] File too large.*\n", done.stderr
            ), done.stderr
            assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "run"]


def test_what_transformers_shall_not_say_grows_by_the_mask_token(tmp_path):
    hf = write_random_model(tmp_path / "hf", "llama")
    (hf / "generation_config.json").write_text(json.dumps({"suppress_tokens": [5, 6]}))
    import_run(hf, tmp_path / "run", None, "mean", 258)
    export_run(tmp_path / "run", tmp_path / "out")
    assert json.loads((tmp_path / "out/generation_config.json").read_text())["suppress_tokens"] == [5, 6, 258]


@pytest.mark.process
def test_the_tool(tmp_path):
    hf, run = write_random_model(tmp_path / "hf", "mistral"), tmp_path / "run"
    layout = ["--tensor-model-parallel-size", 2, "--pipeline-model-parallel-size", 2]
    done = tool("import", "--hf", hf, "--output", run, *layout)
    assert (done.returncode, own_lines(done.stderr)) == (0, [])
    assert "4 layers, hidden size 64, 260 ids, no mask token" in done.stdout
    done = tool("verify", "--hf", hf, "--checkpoint", run, "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout)["max_logit_difference"] <= 1e-4
    done = tool("export", "--checkpoint", run, "--hf", tmp_path / "out")
    assert done.returncode == 0
    assert "no mask token, so tidar generate decodes it plainly" in done.stdout
    same_folder(hf, tmp_path / "out")
    weights = load_file(hf / "model.safetensors")
    weights["model.norm.weight"] *= 2
    save_file(weights, hf / "model.safetensors", metadata={"format": "pt"})
    done = tool("export", "--checkpoint", run, "--hf", tmp_path / "more", "--max-shard-size-gb", "1e300")
    error = "error: --max-shard-size-gb 1e+300: must be a number above 0"
    assert (done.returncode, own_lines(done.stderr)) == (2, [error])
    done = tool("verify", "--hf", hf, "--checkpoint", run)
    assert done.returncode == 2
    assert "is not the model in" in done.stderr


@pytest.mark.slow
def test_what_cannot_be_imported_leaves_nothing(tmp_path):
    hf, run = write_random_model(tmp_path / "hf", "llama", tie=False), tmp_path / "run"
    weights, config = hf / "model.safetensors", json.loads((hf / "config.json").read_text())
    whole = load_file(weights)

    def refuse(said, parallel=None, mask=None, mask_token_id=None, target=run):
        with pytest.raises(UserError, match=said) as caught:
            import_run(hf, target, parallel, mask, mask_token_id)
        assert "\n" not in str(caught.value)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]

    (hf / "tokenizer.model").touch()
    refuse(r"has tokenizer.model but no tokenizer.json")
    (hf / "tokenizer.model").unlink()
    refuse(r"tensor-model-parallel-size 3", ParallelConfig(tensor_model_parallel_size=3))
    refuse(r"no tokenizer to tell which ids are free; add --mask-token-id", mask="mean")
    refuse(r"--mask-token-id 261: the model has ids 0 to 259, and 260 would be a new one", None, "mean", 261)
    refuse("exists and is not empty", target=hf)
    save_file({**whole, "model.norm.weight": torch.ones(63)}, weights)
    refuse(
        r"config.json: gives model.norm.weight the shape \[64\], "
        r"but it is \[63\] in model.safetensors \(hidden_size 64\)"
    )
    save_file({**whole, "model.layers.1.self_attn.k_proj.weight": torch.ones(16, 64)}, weights)
    refuse(r"gives model.layers.1.self_attn.k_proj.weight .*num_key_value_heads 2")
    save_file({**whole, "model.embed_tokens.weight": torch.ones(200, 64)}, weights)
    refuse(r"gives model.embed_tokens.weight .*vocab_size 260")
    save_file({**whole, "model.layers.0.self_attn.q_proj.bias": torch.ones(64)}, weights)
    refuse(r"q_proj.bias is not part of the model")
    for value in (math.nan, math.inf):
        save_file({**whole, "model.norm.weight": torch.full((64,), value)}, weights)
        refuse("model.norm.weight has values that are NaN or infinite")
    for dtype, name in ((torch.int32, "I32"), (torch.float64, "F64")):
        save_file({**whole, "model.norm.weight": torch.ones(64, dtype=dtype)}, weights)
        refuse(f"model.norm.weight has dtype {name}, not one of BF16, F16, F32")
    save_file(whole, weights)
    tokenizer = train_bpe(["a text of which a tokenizer learns some more than four merges"] * 4, 262)
    tokenizer.save_pretrained(str(hf))
    refuse(r"its tokenizer has 261 ids \(without added tokens\) but its model 260: they do not belong together")
    for file in hf.glob("*token*"):
        file.unlink()
    (hf / "config.json").write_text(json.dumps(config | {"dtype": "float8_e4m3fn"}))
    refuse("dtype float8_e4m3fn is not supported")
    (hf / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    refuse("model_type 'gpt2'")


def test_a_full_disk_is_said_and_leaves_nothing(imported, tmp_path, monkeypatch):
    """Raised where the weights are read: torch wraps what fails inside its own writing."""

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Safetensors, "read", full)
    with pytest.raises(UserError, match="No space left on device") as caught:
        import_run(imported / "qwen3-tied" / "hf", tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    return write_random_model(
        tmp_path_factory.mktemp("large") / "hf", "llama", tie=False, num_hidden_layers=16, hidden_size=512,
        intermediate_size=2048, num_attention_heads=8, num_key_value_heads=8, head_dim=64, vocab_size=16384,
    )  # fmt: skip


@pytest.mark.process
@pytest.mark.parametrize("mask", [[], ["mean", 16000]])
def test_importing_holds_one_layer_at_a_time(large, tmp_path, mask):
    """Peak memory beyond the mapped files: measured in a process of its own, by the kernel."""
    hf = large
    size = (hf / "model.safetensors").stat().st_size
    done = ranks.run("-m", "tests.checkpoint.import_memory", hf, tmp_path / "run", *mask)
    assert done.returncode == 0, done.stderr
    grown = json.loads(done.stdout)["anonymous_bytes"]
    assert size > 300e6
    assert grown < 0.2 * size, grown / size
