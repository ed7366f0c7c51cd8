"""A Hugging Face causal LM as the decode step needs it: hidden states for a plan, logits for the rows that matter.

An exported TiDAR checkpoint is an ordinary Llama/Qwen folder whose ``config.json`` has a ``tidar`` section
(``mask_token_id``, ``block_size``). Any other folder serves plain autoregression. What our attention does not
compute, or what would make the output depend on mask positions, is refused by name.
"""

import json
from dataclasses import dataclass
from inspect import unwrap
from pathlib import Path
from types import MethodType
from typing import Any
from weakref import WeakSet

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel

from tidar_megatron.errors import UserError
from tidar_megatron.inference.attention import ATTENTION_NAME, Forward, PackedForward, Part, Plan
from tidar_megatron.inference.cache import KVPool


@dataclass
class DecodeModel:
    """The model, its tokenizer (None when the folder has none) and what decoding must know about it.

    ``mask_token_id`` and ``block_size`` are None without a ``tidar`` section. No forward may hold a position at or
    beyond ``context_limit``. ``is_tidar``: it was trained to draft, not only given a mask token by whoever loads it.
    """

    causal_lm: PreTrainedModel
    tokenizer: Any
    mask_token_id: int | None
    block_size: int | None
    context_limit: int
    eos_token_ids: frozenset[int]
    is_tidar: bool = False

    def __post_init__(self) -> None:
        base: Any = self.causal_lm.base_model
        if "forward" not in vars(base):  # nobody has put one of their own there, as accelerate does
            # below transformers' decorators, which look up defaults and collect what is not asked for
            base = MethodType(unwrap(type(base).forward), base)
        self._base = base
        self._head: nn.Module = self.causal_lm.get_output_embeddings()
        self.dtype: torch.dtype = self.causal_lm.dtype
        self.device: torch.device = self.causal_lm.device
        self.vocab_size: int = self.causal_lm.config.vocab_size

    def check_attention(self) -> None:
        """Before forwards: whoever has the model as well may have given it another attention."""
        ours = self.causal_lm.config._attn_implementation == ATTENTION_NAME
        assert ours, "somebody gave the wrapped model another attention: wrap_model it again"

    def forward(self, packed: Forward) -> Tensor:
        """Run the tokens of all sequences of a forward; their K/V are written to the pool.

        Returns:
            Final hidden states ``[tokens, hidden]``, sequence by sequence, each in the order of its plan's layout.
        """
        ids, positions = packed.inputs(self.mask_token_id, self.device)
        return self._base(
            input_ids=ids,
            position_ids=positions,
            use_cache=False,
            packed_forward=packed,
        ).last_hidden_state[0]

    def logits(self, hidden: Tensor, emitted: bool = True) -> Tensor:
        """Logits ``[rows, vocabulary]`` of hidden states ``[rows, hidden]``.

        The mask token can never be emitted; ``emitted`` False leaves it its own logit, as stock transformers does.
        """
        logits = self._head(hidden)
        if self.mask_token_id is not None and emitted:
            logits.select(-1, self.mask_token_id).fill_(-torch.inf)
        return logits


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
        UserError: no such folder, not a causal LM of transformers or not all of one, or an architecture detail that is
            refused.
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
        refuse_unsupported(config)
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
        UserError: an architecture detail that is refused, or a broken ``tidar`` section.
    """
    config = causal_lm.config
    refuse_unsupported(config)
    causal_lm.eval()
    causal_lm.set_attn_implementation(ATTENTION_NAME)
    if causal_lm.config._attn_implementation != ATTENTION_NAME:
        raise UserError(f"{type(causal_lm).__name__} fixes its own attention; use a Llama, Qwen or Mistral checkpoint")
    mask_token_id, block_size = _tidar_section(config)
    fuse_norms(causal_lm)
    model = DecodeModel(
        causal_lm=causal_lm,
        tokenizer=tokenizer,
        mask_token_id=mask_token_id,
        block_size=block_size,
        context_limit=config.max_position_embeddings,
        eos_token_ids=_eos_token_ids(causal_lm),
        is_tidar=(getattr(config, "tidar", None) or {}).get("trained", mask_token_id is not None),
    )
    if causal_lm not in _COMPARED:
        _compare(model)
        _COMPARED.add(causal_lm)
    return model


_COMPARED: WeakSet[PreTrainedModel] = WeakSet()  # with what transformers computes


@torch.inference_mode()
def _compare(model: DecodeModel) -> None:
    """Refuse an architecture whose attention is more than the one we compute, whatever its name: sinks, differences.

    Some tokens' logits must be those of transformers' own attention, up to rounding.
    """
    causal_lm, count = model.causal_lm, max(2, min(8, model.context_limit // 2 * 2))
    ids = [(11 * place + 5) % model.vocab_size for place in range(count)]
    causal_lm.set_attn_implementation("eager")
    try:
        wanted = causal_lm(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0]
    finally:
        causal_lm.set_attn_implementation(ATTENTION_NAME)
    if not bool(wanted.isfinite().all()):
        return  # whoever decodes is told
    rounding = max(torch.finfo(dtype).eps for dtype in (model.dtype, torch.float32))  # eager's softmax is float32's
    try:
        pool, hidden = KVPool(1, count), []
        for start in (0, count // 2):  # what the second reads of the first is what was kept of it
            part = Part(0, start, ids[start : start + count // 2], Plan(count // 2))
            hidden.append(model.forward(PackedForward(pool, [part])))
        apart = (model.logits(torch.cat(hidden), emitted=False) - wanted).abs().max()
        same = bool(apart <= rounding**0.5 * wanted.abs().max())
    except torch.OutOfMemoryError:
        raise
    except (AssertionError, RuntimeError, TypeError, ValueError):  # it asks otherwise than the others do
        same = False
    if not same:
        raise UserError(
            f"{type(causal_lm).__name__} computes attention in a way of its own, which the engine does not; "
            "use a Llama, Qwen or Mistral checkpoint"
        )


def refuse_unsupported(config: PretrainedConfig) -> None:
    """Raise a UserError that names the first architecture detail that would make decoding silently wrong."""

    def refuse(what: str, why: str) -> None:
        raise UserError(f"{what} is not supported: {why}; use a checkpoint without it")

    layer_types = getattr(config, "layer_types", None) or []
    for layer_type in layer_types:
        if layer_type != "full_attention":
            refuse(f"layer type {layer_type!r} in config.layer_types", "every layer must attend to the whole prefix")
    window = getattr(config, "sliding_window", None)
    # Qwen2 keeps a window it does not use; where no switch exists (Mistral) a window is a used one.
    if getattr(config, "use_sliding_window", not layer_types and window is not None):
        refuse(f"sliding_window={window}", "every layer must attend to the whole prefix")
    for name in ("final_logit_softcapping", "attn_logit_softcapping"):
        if getattr(config, name, None):
            refuse(name, "the engine does not soft-cap logits")
    for name in ("logit_scale", "logits_scaling"):
        if getattr(config, name, None) not in (None, 1.0):
            refuse(name, "the engine reads logits straight from the output embedding")
    rope: dict[str, Any] = {}
    for name in ("rope_scaling", "rope_parameters"):  # transformers 4 and 5
        rope |= getattr(config, name, None) or {}
    rope_type = rope.get("rope_type", rope.get("type"))
    if rope_type in ("dynamic", "longrope"):
        refuse(
            f"rope type {rope_type!r}", "its frequencies depend on the largest position, which mask tokens would move"
        )
    if not isinstance(getattr(config, "max_position_embeddings", None), int):
        refuse("a config without max_position_embeddings", "the context limit must be known")


@torch.inference_mode()
def fuse_norms(causal_lm: PreTrainedModel) -> None:
    """One call of torch for each RMSNorm instead of seven, in float32, where it gives the same bits (Gemma's are other
    norms): of a small model's forward on a CPU they are a tenth."""
    for module in causal_lm.modules():
        if type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
            weight = module.weight
            sample = torch.sin(torch.arange(4.0 * len(weight), device=weight.device)).view(4, -1)
            alone = "forward" not in vars(module)  # nobody has put one of their own there
            if alone and weight.dtype == torch.float32 and torch.equal(_fused_norm(module, sample), module(sample)):
                module.forward = MethodType(_fused_norm, module)


def restore_norms(causal_lm: PreTrainedModel) -> None:
    """Give RMSNorms back their own forward, which :func:`wrap_model` replaced."""
    for module in causal_lm.modules():
        if getattr(vars(module).get("forward"), "__func__", None) is _fused_norm:
            del module.forward


def _fused_norm(module: Any, hidden_states: Tensor) -> Tensor:
    return F.rms_norm(hidden_states, module.weight.shape, module.weight, module.variance_epsilon)


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
