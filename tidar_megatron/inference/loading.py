"""Load a Hugging Face folder, or wrap a model in memory, for decoding.

An exported TiDAR checkpoint is an ordinary Llama/Qwen folder whose ``config.json`` has a ``tidar`` section
(``mask_token_id``, ``block_size``). Any other folder serves plain autoregression. A class that computes more than the
engine does is refused (``compatibility.py``).
"""

import json
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel

from tidar_megatron.errors import UserError
from tidar_megatron.inference.attention import ATTENTION_NAME
from tidar_megatron.inference.compatibility import check_compatible
from tidar_megatron.inference.model import DecodeModel, fuse_norms
from tidar_megatron.mask_token import other_meaning


def load_model(
    path: str | Path,
    device: str | None = None,
    dtype: str | torch.dtype | None = None,
    mask_token_id: int | None = None,
) -> DecodeModel:
    """Load a Hugging Face folder for decoding; no code of the folder is run.

    Args:
        path: a local folder with ``config.json`` and safetensors.
        device: as torch names it; default: ``cuda`` when there is one, else ``cpu``.
        dtype: a floating dtype or its name; default: float32 on the CPU (bfloat16 is slow there), else bfloat16.
        mask_token_id: lets a model without a ``tidar`` section draft with this token, which it has not learned to.

    Raises:
        UserError: no such folder, not a causal LM of transformers or not all of one, or a class that computes more
            than the engine does.
    """
    path = Path(path)
    if not (path / "config.json").is_file():
        raise UserError(
            f"{path}: no config.json there; give a Hugging Face folder (tools/convert_checkpoint.py exports one)"
        )
    torch_device = _device(device)
    torch_dtype = _dtype(dtype, torch_device)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        if mask_token_id is not None and getattr(config, "tidar", None):
            raise UserError(
                f"mask token {mask_token_id}: {path} has learned to draft with its own, "
                f"{config.tidar.get('mask_token_id')}; leave it out"
            )
        if mask_token_id is not None:
            config.tidar = {"mask_token_id": mask_token_id, "block_size": 8, "trained": False}
        causal_lm, found = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            dtype=torch_dtype,
            attn_implementation=ATTENTION_NAME,
            trust_remote_code=False,
            output_loading_info=True,
        )
        # transformers draws at random what it does not find
        if missing := sorted(found["missing_keys"]):
            raise UserError(f"{path}: {missing[0]} is missing from its weights; export it or copy it again")
    except UserError:
        raise
    except (OSError, ValueError, KeyError, json.JSONDecodeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{path}: transformers cannot load it as a causal LM ({reason}); export it or copy it again"
        ) from error
    return wrap_model(causal_lm.to(torch_device).requires_grad_(False), _load_tokenizer(path))


def wrap_model(causal_lm: PreTrainedModel, tokenizer: Any = None) -> DecodeModel:
    """Wrap a model that is already in memory; it is switched to evaluation and to our attention, in place.

    Raises:
        UserError: the class computes more than the engine does, or a broken ``tidar`` section.
    """
    config = causal_lm.config
    causal_lm.eval()
    causal_lm.set_attn_implementation(ATTENTION_NAME)
    if causal_lm.config._attn_implementation != ATTENTION_NAME:
        raise UserError(f"{type(causal_lm).__name__} fixes its own attention; use a Llama, Qwen or Mistral checkpoint")
    context_limit = getattr(config, "max_position_embeddings", None)
    if not isinstance(context_limit, int) or context_limit < 1:
        raise UserError(
            f"{type(causal_lm).__name__}: its config has no max_position_embeddings, so the context limit is unknown; "
            "use a Llama, Qwen or Mistral checkpoint"
        )
    mask_token_id, block_size = _tidar_section(config)
    settings = [part.to_dict() for part in (config, getattr(causal_lm, "generation_config", None)) if part is not None]
    if mask_token_id is not None and (meaning := other_meaning(mask_token_id, tokenizer, *settings)):
        raise UserError(
            f"mask token {mask_token_id}: is {meaning}; the mask token may have no other meaning, choose another id"
        )
    fuse_norms(causal_lm)
    model = DecodeModel(
        causal_lm=causal_lm,
        tokenizer=tokenizer,
        mask_token_id=mask_token_id,
        block_size=block_size,
        context_limit=context_limit,
        eos_token_ids=_eos_token_ids(causal_lm),
        is_tidar=(getattr(config, "tidar", None) or {}).get("trained", mask_token_id is not None),
    )
    if causal_lm not in _CHECKED:
        check_compatible(model)
        _CHECKED.add(causal_lm)
    return model


_CHECKED: WeakSet[PreTrainedModel] = WeakSet()  # models that were compared with what transformers computes


def _tidar_section(config: PretrainedConfig) -> tuple[int | None, int | None]:
    section = getattr(config, "tidar", None)
    if section is None:
        return None, None
    try:
        mask_token_id, block_size = section["mask_token_id"], section["block_size"]
    except (KeyError, TypeError):
        raise UserError("config.json: tidar needs mask_token_id and block_size; export the checkpoint again") from None
    if not (isinstance(mask_token_id, int) and 0 <= mask_token_id < config.vocab_size):
        raise UserError(f"config.json: tidar.mask_token_id {mask_token_id!r} is not an id below {config.vocab_size}")
    if not (isinstance(block_size, int) and block_size >= 1):
        raise UserError(f"config.json: tidar.block_size {block_size!r} is not a positive integer")
    return mask_token_id, block_size


def _eos_token_ids(causal_lm: PreTrainedModel) -> frozenset[int]:
    ids = getattr(causal_lm.generation_config, "eos_token_id", None)
    if ids is None:
        ids = getattr(causal_lm.config, "eos_token_id", None)
    return frozenset() if ids is None else frozenset([ids] if isinstance(ids, int) else ids)


def _load_tokenizer(path: Path) -> Any:
    """None without one: token ids still work, and a program that needs text says so."""
    if not any(path.glob("tokenizer*")):  # transformers would make up an empty one from config.json
        return None
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{path}: its tokenizer cannot be loaded ({reason}); export the checkpoint again") from error


def _device(name: str | None) -> torch.device:
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0).to(name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name!r} cannot be used here; use --device cpu") from error
    return torch.device(name)


def _dtype(name: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    if name is None:
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    dtype = name if isinstance(name, torch.dtype) else getattr(torch, name, None)
    if dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise UserError(f"dtype {name!r}: use float32, bfloat16, float16 or float64")
    return dtype
