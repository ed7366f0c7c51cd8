"""Loads adapters, the draft weights of a frozen model, and checks that they belong to it."""

import math
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from tidar_megatron.adapter import CANDIDATES, SELECTOR_SCALE, Adapter, read_adapter, weights_hash
from tidar_megatron.errors import UserError
from tidar_megatron.hf_folder.weights import open_safetensors, stored_tensors
from tidar_megatron.inference.draft_weights import DraftWeights, Pair, Selector
from tidar_megatron.inference.model import DecodeModel


def load_adapter(model: DecodeModel, folder: str | Path, base: str | Path) -> None:
    """Load an adapter's folder into a model that was loaded from the folder ``base``; the model drafts from then on.

    Raises:
        UserError: The adapter is broken or belongs to another base, or the model drafts already.
    """
    adapter = read_adapter(folder)
    config = adapter.config
    if model.mask_token_id is not None:
        raise UserError(f"--adapter {folder}: {base} drafts by itself; leave the adapter out, or name its base model")
    if model.lean is None:
        name = type(model.causal_lm).__name__
        raise UserError(f"--adapter {folder}: {name} is not supported; adapters need a dense Llama, Mistral or Qwen")
    found = weights_hash(base)
    if found != config.base_sha256:
        raise UserError(
            f"--adapter {folder}: was trained for other weights (SHA-256 {config.base_sha256[:12]}..) than {base} has "
            f"({found[:12]}..); give the folder that it was trained on"
        )
    _check_shapes(adapter, model, Path(folder))
    table = None
    if config.selector_rank:
        tied = model.causal_lm.config.tie_word_embeddings
        name = "model.embed_tokens.weight" if tied else "lm_head.weight"
        stored = stored_tensors(base, other_names=True).get(name)
        if stored is None:
            raise UserError(f"--adapter {folder}: {base} has no tensor {name}, which the selector needs; save it again")
        table = open_safetensors(stored.file).get_tensor(name)
    use_adapter(model, adapter, table)


def _check_shapes(adapter: Adapter, model: DecodeModel, folder: Path) -> None:
    about = model.causal_lm.config
    heads, groups = about.num_attention_heads, about.num_key_value_heads
    d, h, f = getattr(about, "head_dim", None) or about.hidden_size // heads, about.hidden_size, about.intermediate_size
    inputs = {"qkv": h, "o": heads * d, "gate_up": h, "down": f}
    outputs = {"qkv": (heads + 2 * groups) * d, "o": h, "gate_up": 2 * f, "down": h}
    wanted = adapter.shapes(inputs, outputs)
    found = {name: tuple(tensor.shape) for name, tensor in adapter.tensors.items()}
    wrong = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    if wrong or (adapter.config.num_layers, adapter.config.vocab_size) != (about.num_hidden_layers, about.vocab_size):
        what = f"{wrong[0]} has the shape {found.get(wrong[0])}, not {wanted.get(wrong[0])}" if wrong else "its sizes"
        raise UserError(f"--adapter {folder}: does not fit the model ({what}); export it again")


@torch.no_grad()
def use_adapter(model: DecodeModel, adapter: Adapter, table: Tensor | None) -> None:
    """Let a model draft with an adapter that fits it.

    Args:
        model: The model.
        adapter: The adapter.
        table: The rows of the model's output layer, ``[V, h]``; only a selector needs them.
    """
    config = adapter.config

    def get(name: str) -> Tensor:
        return adapter.tensors[name].to(model.device, model.dtype)

    def pair(layer: int, name: str) -> Pair:
        a, b = (get(f"layers.{layer}.{name}.{part}") for part in "ab")
        return Pair(a, b * config.scale)

    layers = [{name: pair(layer, name) for name in config.modules} for layer in range(config.num_layers)]
    selector = None
    if config.selector_rank and table is not None:
        table = table.to(model.device, model.dtype)
        previous, candidate = (F.linear(table, get(f"selector.{name}")) for name in ("previous", "candidate"))
        gate, scale = (
            (get("selector.gate"), get("selector.gate_bias")),
            SELECTOR_SCALE / math.sqrt(config.selector_rank),
        )
        selector = Selector(previous, candidate, *gate, scale, CANDIDATES)
    draft_with(model, DraftWeights(config.rank, get("mask_embedding"), layers, selector), config.block_size)


def draft_with(model: DecodeModel, drafts: DraftWeights, block_size: int) -> None:
    """Let a model draft with weights that fit it.

    The masks have no token id of their own: :attr:`DecodeModel.mask_token_id` is the id after the last one.
    """
    assert model.lean is not None
    model.drafts = drafts
    model.lean.use_drafts(drafts)
    model.mask_token_id, model.block_size, model.is_tidar = model.vocab_size, block_size, True


def without_selector(drafts: DraftWeights) -> DraftWeights:
    """Return the draft weights without their selector."""
    return replace(drafts, selector=None)
