"""A Hugging Face causal LM for decoding: hidden states of a packed forward, and logits of selected rows.

``loading.py`` creates one from a folder, ``wrapping.py`` from a model in memory.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from inspect import unwrap
from types import MethodType
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from tidar_megatron.attention_kernels import HALF
from tidar_megatron.inference.attention import ATTENTION_NAME
from tidar_megatron.inference.draft_weights import DraftWeights
from tidar_megatron.inference.forward import Forward


class Lean(Protocol):
    """A forward that takes the place of the modules' (lean.py)."""

    is_compiled: bool  # whether its layers are called from C++

    def __call__(self, ids: Tensor, positions: Tensor, packed: Forward) -> Tensor:
        """Return the final hidden states, as :meth:`DecodeModel.modules_forward` does."""

    def use_drafts(self, drafts: DraftWeights) -> None:
        """Let draft weights act on the rows of masks from now on."""

    def holds(self) -> bool:
        """Return whether it still computes what the modules do."""


@dataclass
class DecodeModel:
    """The model, its tokenizer (None if the folder has none) and its properties that matter for decoding.

    ``mask_token_id`` and ``block_size`` are None without a ``tidar`` section or an adapter; the masks of an adapter
    have the id ``vocab_size``, which no token has. All positions of a forward must be below ``context_limit``.
    ``is_tidar`` is True if the model was trained to draft, not merely loaded with a mask token.
    """

    causal_lm: PreTrainedModel
    tokenizer: Any
    mask_token_id: int | None
    block_size: int | None
    context_limit: int
    eos_token_ids: frozenset[int]
    is_tidar: bool = False
    # runners of forwards that no engine uses, by slots and capacity (static.py)
    idle_forwards: dict[tuple[int, int], Any] = field(default_factory=dict, init=False, repr=False, compare=False)
    lean: "Lean | None" = field(default=None, repr=False, compare=False)
    head: Callable[[Tensor], Tensor] | None = field(default=None, repr=False, compare=False)  # default: the model's own
    drafts: DraftWeights | None = field(default=None, init=False, repr=False, compare=False)  # of an adapter
    quantize: str | None = field(
        default=None, init=False
    )  # how lean's and head's weights are quantized (quantizing.py)

    def __post_init__(self) -> None:
        base: Any = self.causal_lm.base_model
        if "forward" not in vars(base):  # not replaced, as accelerate does
            # skip transformers' decorators, which look up defaults and collect outputs that are not needed
            base = MethodType(unwrap(type(base).forward), base)
        self._base = base
        self._head: Callable[[Tensor], Tensor] = self.causal_lm.get_output_embeddings()
        self.dtype: torch.dtype = self.causal_lm.dtype
        self.device: torch.device = self.causal_lm.device
        self.vocab_size: int = self.causal_lm.config.vocab_size

    def check_attention(self) -> None:
        """Assert that the model still uses the engine's attention, which other users of the model may have changed.

        If they have changed its modules, these run from now on.
        """
        ours = self.causal_lm.config._attn_implementation == ATTENTION_NAME
        assert ours, "somebody gave the wrapped model another attention: wrap_model it again"
        if self.lean is not None and not self.lean.holds():
            self.lean = None

    def forward(self, packed: Forward) -> Tensor:
        """Run a forward over the tokens of all its sequences and write their K/V to the pool.

        Returns:
            Final hidden states ``[tokens, hidden]``, sequence by sequence, each in the order of its layout.
        """
        if self.drafts is not None:
            assert self.lean is not None, "somebody changed the modules of a model with an adapter: load it again"
        # any id does for the masks of an adapter, which have an input of their own
        ids, positions = packed.inputs(self.mask_token_id if self.drafts is None else 0, self.device)
        return (self.lean or self.modules_forward)(ids, positions, packed)

    def modules_forward(self, ids: Tensor, positions: Tensor, packed: Forward) -> Tensor:
        """Return the final hidden states of transformers' modules, as :meth:`forward` does."""
        return self._base(
            input_ids=ids,
            position_ids=positions,
            use_cache=False,
            packed_forward=packed,
        ).last_hidden_state[0]

    def logits(self, hidden: Tensor, emitted: bool = True) -> Tensor:
        """Return the logits ``[rows, vocabulary]`` of hidden states ``[rows, hidden]``.

        The logit of a mask token that has an id is minus infinity, so that it is never emitted. If ``emitted`` is
        False, it keeps its own logit, as in transformers.
        """
        logits = (self.head or self._head)(hidden)
        if self.mask_token_id is not None and self.mask_token_id < self.vocab_size and emitted:
            logits.select(-1, self.mask_token_id).fill_(-torch.inf)
        return logits


@torch.inference_mode()
def fuse_norms(causal_lm: PreTrainedModel) -> None:
    """Replace each RMSNorm's forward with torch's fused one, if the result is bitwise identical.

    The unfused norms make seven calls each and take a tenth of a small model's forward on a CPU, and half of the kernel
    launches of a decode step on a GPU. Some classes have other norms (Gemma's), which the bitwise check leaves alone.
    """
    for module in causal_lm.modules():
        if type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
            weight = module.weight
            fused = _fused_norm_for(weight.dtype, weight.device)
            if fused is None or "forward" in vars(module):  # replaced by somebody else
                continue
            sample = torch.sin(torch.arange(4.0 * len(weight), device=weight.device)).view(4, -1).to(weight.dtype)
            if torch.equal(fused(module, sample), module(sample)):
                module.forward = MethodType(fused, module)


def restore_norms(causal_lm: PreTrainedModel) -> None:
    """Restore the RMSNorms' own forward, which :func:`fuse_norms` replaced."""
    for module in causal_lm.modules():
        if getattr(vars(module).get("forward"), "__func__", None) in FUSED:
            del module.forward


def _fused_norm_for(dtype: torch.dtype, device: torch.device) -> Callable[[Any, Tensor], Tensor] | None:
    if dtype == torch.float32:
        return _fused_norm
    # a CPU has no fused kernel for half precision
    return _fused_half_norm if dtype in HALF and device.type == "cuda" else None


def _fused_norm(module: Any, hidden_states: Tensor) -> Tensor:
    return F.rms_norm(hidden_states, module.weight.shape, module.weight, module.variance_epsilon)


def _fused_half_norm(module: Any, hidden_states: Tensor) -> Tensor:
    """Round before the product with the weight, as transformers' classes do."""
    return module.weight * F.rms_norm(hidden_states, module.weight.shape, None, module.variance_epsilon)


FUSED = (_fused_norm, _fused_half_norm)
