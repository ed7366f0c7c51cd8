"""Hugging Face folders in and out, through the name-mapping table.

A TiDAR model is an ordinary Qwen3, Llama or Qwen2 checkpoint: the mask token is one more vocabulary id, so whatever
loads those loads it. What is TiDAR's own stands in the ``tidar`` section of ``config.json``.
"""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from safetensors import safe_open
from torch import Tensor

from tidar_megatron.checkpoint.custom_generate import write_custom_generate
from tidar_megatron.checkpoint.mapping import (
    MASK_TOKEN,
    cut,
    entry_of,
    huggingface_names,
    join,
    own_parameters,
    shard_group,
    split,
)
from tidar_megatron.config import Config, ModelConfig
from tidar_megatron.data.tokenizer import load_tokenizer
from tidar_megatron.errors import UserError

# --- configurations ----------------------------------------------------------------------------------------------
CLASSES = {  # (qk_layernorm, add_qkv_bias) -> Hugging Face model type
    (True, False): "qwen3",
    (False, False): "llama",
    (False, True): "qwen2",
}


def read_json(path: Path) -> dict[str, Any]:
    """A folder's JSON file.

    Raises:
        UserError: it is missing or no JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise UserError(f"{path}: not found; give a Hugging Face model folder") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no JSON object")
    return content


def model_from_huggingface(folder: str | Path, ours: ModelConfig) -> ModelConfig:
    """``ours`` with everything that a Hugging Face ``config.json`` decides.

    Raises:
        UserError: a model we would not compute as Hugging Face does, named.
    """
    path = Path(folder) / "config.json"
    hf = read_json(path)
    model_type = hf.get("model_type")
    if model_type not in CLASSES.values():
        raise UserError(f"{path}: model_type {model_type!r} is not one of {', '.join(CLASSES.values())}")
    qk_layernorm, qkv_bias = next(key for key, name in CLASSES.items() if name == model_type)
    rope = hf.get("rope_parameters") or {}
    rope_scaling = hf.get("rope_scaling") or rope
    kind = rope_scaling.get("rope_type", rope_scaling.get("type", "default"))
    refused = {
        f"rope type {kind!r}": kind != "default",
        "attention_bias": hf.get("attention_bias"),
        "mlp_bias": hf.get("mlp_bias"),
        "sliding windows": hf.get("use_sliding_window"),
        f"hidden_act {hf.get('hidden_act')!r}": hf.get("hidden_act", "silu") != "silu",
    }
    for name, present in refused.items():
        if present:
            raise UserError(f"{path}: {name} is not supported yet; start from a model without it")
    for key in "num_hidden_layers hidden_size intermediate_size num_attention_heads rms_norm_eps vocab_size".split():
        if not hf.get(key):
            raise UserError(f"{path}: has no {key}; is it a whole model folder?")
    heads = hf["num_attention_heads"]
    return dataclasses.replace(
        ours,
        num_layers=hf["num_hidden_layers"],
        hidden_size=hf["hidden_size"],
        ffn_hidden_size=hf["intermediate_size"],
        num_attention_heads=heads,
        num_query_groups=hf.get("num_key_value_heads") or heads,
        kv_channels=hf.get("head_dim") or hf["hidden_size"] // heads,
        qk_layernorm=qk_layernorm,
        add_qkv_bias=qkv_bias,
        untie_embeddings_and_output_weights=not hf.get("tie_word_embeddings", False),
        norm_epsilon=hf["rms_norm_eps"],
        rotary_base=float(rope.get("rope_theta") or hf.get("rope_theta") or 10000.0),
        max_position_embeddings=ours.max_position_embeddings or hf.get("max_position_embeddings"),
        vocab_size=hf["vocab_size"],
    )


def mask_token_of_huggingface(folder: str | Path) -> int | None:
    """The mask token of a folder that was exported from a TiDAR run; None for any other."""
    return (read_json(Path(folder) / "config.json").get("tidar") or {}).get("mask_token_id")


def check_huggingface_tokenizer(folder: str | Path, data_tokenizer: str | Path) -> None:
    """Refuse data that was not prepared with the model's tokenizer. A folder without a tokenizer is accepted.

    Raises:
        UserError: their vocabularies differ (our mask token's name aside).
    """
    if not (Path(folder) / "tokenizer.json").exists():
        return
    theirs, ours = (load_tokenizer(path).get_vocab() for path in (folder, data_tokenizer))
    for vocabulary in (theirs, ours):
        vocabulary.pop(MASK_TOKEN, None)
    if theirs != ours:
        raise UserError(
            f"--init-from {folder}: its tokenizer is not the data's; prepare the data with --tokenizer {folder}"
        )


def huggingface_config(config: Config, eos_token_id: int | None) -> Any:
    """The transformers configuration of a trained model, with its ``tidar`` section."""
    from transformers import AutoConfig

    model, kind = config.model, (config.model.qk_layernorm, config.model.add_qkv_bias)
    if model.num_experts is not None:
        raise UserError("a mixture of experts cannot be exported to a Hugging Face folder yet")
    if kind not in CLASSES:
        raise UserError(
            "no Hugging Face class has both --qk-layernorm and --add-qkv-bias: the model cannot be exported"
        )
    settings: dict[str, Any] = {}
    if CLASSES[kind] != "qwen2":
        settings["head_dim"] = model.head_channels
    elif model.head_channels * model.num_attention_heads != model.hidden_size:
        raise UserError(
            "Qwen2's heads are hidden-size / num-attention-heads wide: other --kv-channels cannot be exported"
        )
    return AutoConfig.for_model(
        CLASSES[kind],
        num_hidden_layers=model.num_layers,
        hidden_size=model.hidden_size,
        intermediate_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.num_query_groups or model.num_attention_heads,
        tie_word_embeddings=not model.untie_embeddings_and_output_weights,
        rms_norm_eps=model.norm_epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": model.rotary_base},
        max_position_embeddings=model.max_position_embeddings or config.data.seq_length,
        vocab_size=model.vocab_size,
        bos_token_id=None,
        eos_token_id=eos_token_id,
        initializer_range=model.init_method_std,
        tidar={
            "block_size": config.tidar.block_size,
            "mask_token_id": config.tidar.mask_token_id,
            "ar_loss_weight": config.tidar.ar_loss_weight,
            "seq_length": config.data.seq_length,
        },
        **settings,
    )


# --- weights -----------------------------------------------------------------------------------------------------
def open_safetensors(folder: str | Path) -> Callable[[str], Tensor]:
    """A function from a tensor's name to the tensor, read when asked for, from one file or an indexed set.

    Raises:
        UserError: there are no safetensors in the folder, or (when asked) no such tensor.
    """
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    files = sorted(
        {folder / name for name in read_json(index)["weight_map"].values()}
        if index.exists()
        else folder.glob("*.safetensors")
    )
    if not files:
        raise UserError(f"{folder}: holds no *.safetensors; save the model with safe serialization")
    where: dict[str, Any] = {}
    for file in files:
        if not file.exists():
            raise UserError(f"{file}: named in {index.name} but missing; copy the whole folder again")
        handle = safe_open(str(file), framework="pt")
        where |= dict.fromkeys(handle.keys(), handle)

    def read(name: str) -> Tensor:
        if name not in where:
            raise UserError(f"{folder}: tensor {name} is missing from the safetensors")
        return where[name].get_tensor(name)

    return read


@torch.no_grad()
def load_huggingface_weights(chunks: list[GPTModel], folder: str | Path, vocab_size: int) -> None:
    """Fill this rank's part of the model, tensor by tensor, from a Hugging Face folder.

    Rows of the vocabulary that the folder does not have and that are in use (a mask token beyond it, up to
    ``vocab_size``) start as the mean of the others; rows of padding as zeros.
    """
    read = open_safetensors(folder)
    for name, parameter, model in own_parameters(chunks):
        group = shard_group(model, name)
        entry, numbers = entry_of(name)
        names = huggingface_names(entry, numbers)
        whole = join(entry, [read(hf).to(parameter.dtype) for hf in names], model.config.num_query_groups)
        if name in ("embedding.word_embeddings.weight", "output_layer.weight"):
            grown = whole.new_zeros(parameter.shape[0] * group.size(), whole.shape[1])
            grown[: whole.shape[0]] = whole
            grown[whole.shape[0] : vocab_size] = whole.mean(0)
            whole = grown
        part = cut(entry, whole, group.rank(), group.size())
        if part.shape != parameter.shape:
            raise UserError(
                f"{folder}: {names[0]} does not fit: "
                f"{tuple(part.shape)} instead of {tuple(parameter.shape)}; is config.json of the same model?"
            )
        parameter.copy_(part)


def export_huggingface(model: GPTModel, config: Config, tokenizer: Any, folder: str | Path) -> None:
    """Write a whole model (TP = PP = 1) as a Hugging Face folder: config, safetensors, tokenizer.

    Args:
        model: the trained model.
        config: its resolved configuration.
        tokenizer: the transformers tokenizer it was trained with, or None.
        folder: where to write; must not exist yet, or be empty.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig

    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder}: exists and is not empty; choose another folder or remove it")
    eos_token_id = tokenizer.eos_token_id if tokenizer is not None else None
    hf_config = huggingface_config(config, eos_token_id)
    vocab_size, groups = hf_config.vocab_size, model.config.num_query_groups
    weights: dict[str, Tensor] = {}
    for name, parameter, _ in own_parameters([model]):
        entry, numbers = entry_of(name)
        whole = (
            parameter.detach()[:vocab_size] if entry.shard == "rows" and entry.join == "same" else parameter.detach()
        )
        parts = split(entry, whole, groups, model.config.num_attention_heads)
        weights |= {hf: part.clone() for hf, part in zip(huggingface_names(entry, numbers), parts, strict=True)}
    with torch.device("meta"):
        hf_model = AutoModelForCausalLM.from_config(hf_config, dtype=model.config.params_dtype)
    missing, unexpected = hf_model.load_state_dict(weights, strict=False, assign=True)
    tied = {"lm_head.weight"} if hf_config.tie_word_embeddings else set()
    assert not unexpected and set(missing) <= tied, (missing, unexpected)
    hf_model.tie_weights()
    never = [config.tidar.mask_token_id]  # the mask token is no word: transformers' generate shall not say it either
    hf_model.generation_config = GenerationConfig(eos_token_id=eos_token_id, do_sample=False, suppress_tokens=never)

    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    hf_model.save_pretrained(partial)
    write_custom_generate(partial)
    if tokenizer is not None:
        if len(tokenizer) == config.tidar.mask_token_id:  # the next free id: the mask token gets its name
            tokenizer.add_tokens([MASK_TOKEN], special_tokens=True)
        tokenizer.save_pretrained(partial)
    if folder.exists():
        folder.rmdir()
    partial.rename(folder)
