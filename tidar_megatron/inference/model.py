"""A Hugging Face causal LM as the decode step needs it: hidden states for a plan, logits for the rows that matter.

``loading.py`` makes one, from a folder or from a model in memory.
"""

from dataclasses import dataclass
from inspect import unwrap
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from tidar_megatron.inference.attention import ATTENTION_NAME
from tidar_megatron.inference.forward import Forward


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
