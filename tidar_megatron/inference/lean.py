"""A forward of Llama, Mistral, Qwen2 and Qwen3 in few calls: what transformers' modules compute, without the modules.

Half of a small model's forward is not its matrix products. Here q, k, v share one product, and gate and up another; the
rotary table is made once; norms are fused; and there is one call per operation. Where ``tidar compile`` has been run,
C++ computes the layers (:mod:`~tidar_megatron.inference.native`). Other classes, and modules that somebody has
changed or hooked, run as transformers' modules.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from types import ModuleType
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import SiLUActivation
from transformers.models.llama import modeling_llama as llama
from transformers.models.mistral import modeling_mistral as mistral
from transformers.models.qwen2 import modeling_qwen2 as qwen2
from transformers.models.qwen3 import modeling_qwen3 as qwen3

from tidar_megatron.attention_kernels import HALF
from tidar_megatron.inference.cache import KVPool
from tidar_megatron.inference.draft_weights import DraftWeights, LayerPairs, MaskRows
from tidar_megatron.inference.forward import Forward, ForwardLayout, PackedForward, Part, own_mask
from tidar_megatron.inference.model import FUSED, DecodeModel
from tidar_megatron.inference.products import (
    ROWS,
    SMALL,
    Product,
    ProductOf,
    can_pack,
    laid_out,
    least_rows,
    leave_no_weights,
    of_library,
    plain,
    rounds_once,
    side_by_side,
    take_weights,
)

ORDER = ("qkv", "o", "gate_up", "down")  # of the pairs of a layer in C++
# per base model: the classes of its layer, attention, MLP, RMSNorm and rotary embedding
CLASSES: dict[type[nn.Module], set[type[nn.Module]]] = {
    llama.LlamaModel: {
        *(llama.LlamaDecoderLayer, llama.LlamaAttention, llama.LlamaMLP, llama.LlamaRMSNorm),
        llama.LlamaRotaryEmbedding,
    },
    mistral.MistralModel: {
        *(mistral.MistralDecoderLayer, mistral.MistralAttention, mistral.MistralMLP, mistral.MistralRMSNorm),
        mistral.MistralRotaryEmbedding,
    },
    qwen2.Qwen2Model: {
        *(qwen2.Qwen2DecoderLayer, qwen2.Qwen2Attention, qwen2.Qwen2MLP, qwen2.Qwen2RMSNorm),
        qwen2.Qwen2RotaryEmbedding,
    },
    qwen3.Qwen3Model: {
        *(qwen3.Qwen3DecoderLayer, qwen3.Qwen3Attention, qwen3.Qwen3MLP, qwen3.Qwen3RMSNorm),
        qwen3.Qwen3RotaryEmbedding,
    },
}


def is_lean(causal_lm: PreTrainedModel) -> bool:
    """Return whether :class:`LeanForward` computes what this model does: its classes are known and nobody hooked them.

    Activations are of any class: they are called as they are.
    """
    base = causal_lm.base_model
    known = CLASSES.get(type(base))
    if known is None or not len(base.layers):
        return False
    for name, module in base.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            return False
        if name == "" or name.endswith("act_fn") or isinstance(module, nn.ModuleList):
            continue
        if type(module) not in {*known, nn.Linear, nn.Embedding}:
            return False
        own = vars(module).get("forward")
        if own is not None and getattr(own, "__func__", None) not in FUSED:
            return False
    return True


@torch.inference_mode()
def use_lean_forward(
    model: DecodeModel,
    take: bool = False,
    product_of: ProductOf = laid_out,
    embedding: Callable[[Tensor], Tensor] | None = None,
    library: ModuleType | None = None,
) -> None:
    """Let a model decode by a :class:`LeanForward`, if it computes what the modules compute.

    Args:
        model: The model.
        take: As for :class:`LeanForward`; the output layer's weight is taken too, or copied if the embedding shares it.
        product_of: As for :class:`LeanForward`.
        embedding: Takes the place of the input embedding if the output layer shares its weight.
        library: The compiled calls of a layer, if they are to be used.
    """
    causal_lm = model.causal_lm
    if not is_lean(causal_lm) or not _agrees(model, LeanForward(causal_lm)):
        return
    if not take:
        model.lean = LeanForward(causal_lm)
        return
    if product_of is laid_out and library is not None and library.has_own_kernels(causal_lm.dtype):
        product_of = of_library(library)
    elif product_of is laid_out and max(weight.nbytes for weight in causal_lm.base_model.parameters()) < SMALL:
        product_of = plain
    lean = LeanForward(causal_lm, take, product_of, library)
    inputs, outputs = causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings()
    if outputs.weight is not inputs.weight:
        head = take_weights([outputs], product_of)
    else:
        head = product_of(outputs.weight, outputs.bias)
        if embedding is not None:
            lean.embed = embedding
            leave_no_weights([inputs, outputs])
    for weight in causal_lm.parameters():
        if not weight.is_meta:
            weight.data = weight.data.clone()  # what is left may keep a whole file in memory
    causal_lm.base_model.register_forward_pre_hook(_weights_are_taken)
    model.lean, model.head = lean, lean.with_padding(head)


def _weights_are_taken(*_: object) -> None:
    raise RuntimeError(
        "the model's weights were laid out for decoding; load it with keep_weights=True to run its own forward"
    )


def _agrees(model: DecodeModel, lean: "LeanForward") -> bool:
    """Return whether hidden states differ by rounding only: by some last bits of the largest."""
    tokens = min(4, model.context_limit, model.vocab_size)
    parts = [Part(0, 0, range(tokens), ForwardLayout(tokens))]

    def hidden(forward: Callable[[Tensor, Tensor, Forward], Tensor]) -> Tensor:
        packed_forward = PackedForward(KVPool(1, tokens), parts)
        ids, positions = packed_forward.inputs(None, model.device)
        return forward(ids, positions, packed_forward)

    found, wanted = hidden(lean), hidden(model.modules_forward)
    allowed = 64 * torch.finfo(wanted.dtype).eps * wanted.nan_to_num(0, 0, 0).abs().max().item()
    return torch.allclose(found, wanted, rtol=0, atol=allowed, equal_nan=True)


class Norm:
    """An RMSNorm in few calls, which rounds half precision once; ``fixed`` weights never change."""

    def __init__(self, module: nn.Module, fixed: bool) -> None:
        self._module, self._eps = module, module.variance_epsilon
        self._kept = torch.cat([module.weight] * 2) if fixed and module.weight.dtype in HALF else None

    def __call__(self, x: Tensor) -> Tensor:
        weight = self._module.weight
        if x.dtype not in HALF or rounds_once(x.device):
            return F.rms_norm(x, weight.shape, weight, self._eps)
        # the RMSNorm of x is the LayerNorm of [x, -x], whose mean is 0: torch has a CPU kernel for that one
        twice = torch.cat([weight, weight]) if self._kept is None else self._kept
        return F.layer_norm(torch.cat([x, -x], -1), twice.shape, twice, eps=self._eps)[..., : len(weight)]

    def in_cpp(self, library: ModuleType) -> object:
        """Return the same norm from C++; its weights are fixed."""
        return library.Norm(self._module.weight if self._kept is None else self._kept, self._eps)


class Calls(Protocol):
    """The calls of one layer around its attention, from Python or from C++."""

    def before(
        self, hidden: Tensor, tokens: int, cos: Tensor, sin: Tensor, masks: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values, ``[1, heads, tokens, D]`` each, of the first ``tokens`` rows.

        ``masks`` are the rows to which draft weights add, in the form that these calls want; None for no row.
        """

    def after(self, hidden: Tensor, out: Tensor, masks: Any) -> Tensor:
        """Return the hidden states after the layer.

        Args:
            hidden: Those before it, ``[rows, hidden]``.
            out: The output of attention, ``[tokens, H * D]``; further rows are padding.
            masks: As for :meth:`before`.
        """


@dataclass(frozen=True)
class _Layer:
    """The products, norms and sizes of one layer, and its calls from Python."""

    before_attention: Norm
    qkv: Product
    qk_norm: Callable[[], Tensor] | None  # the weights of the norms of q and k, [H + N, 1, D]
    qk_eps: float
    output: Product
    before_mlp: Norm
    gate_up: Product
    down: Product
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    activation: nn.Module
    gated: Callable[[Tensor, Tensor], Tensor]
    rotated: Callable[..., Tensor]
    pairs: LayerPairs = field(default_factory=dict)  # draft weights, which LeanForward.use_drafts adds

    def before(
        self, hidden: Tensor, tokens: int, cos: Tensor, sin: Tensor, masks: MaskRows | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values; see :class:`Calls`."""
        x = self.before_attention(hidden)
        qkv = self._with_pair(self.qkv.of(x), x, "qkv", masks)
        qkv = (qkv if len(qkv) == tokens else qkv[:tokens]).view(1, tokens, -1, self.head_dim).transpose(1, 2)
        qk, value = qkv.split([self.heads + self.kv_heads, self.kv_heads], 1)
        qk = self.rotated(qk, cos, sin, self.qk_norm and self.qk_norm(), self.qk_eps)
        query, key = qk.split([self.heads, self.kv_heads], 1)
        return query, key, value

    def after(self, hidden: Tensor, out: Tensor, masks: MaskRows | None) -> Tensor:
        """Return the hidden states after the layer; see :class:`Calls`."""
        fill = len(hidden) - len(out)
        out = F.pad(out, (0, 0, 0, fill)) if fill else out
        hidden = self._with_pair(self.output.added(hidden, out), out, "o", masks)
        x = self.before_mlp(hidden)
        gate, up = self._with_pair(self.gate_up.of(x), x, "gate_up", masks).chunk(2, -1)
        inner = self.gated(gate, up)
        return self._with_pair(self.down.added(hidden, inner), inner, "down", masks)

    def _with_pair(self, out: Tensor, x: Tensor, name: str, masks: MaskRows | None) -> Tensor:
        if masks is not None and name in self.pairs:
            self.pairs[name].add(out, x, masks)
        return out

    @property
    def products(self) -> tuple[Product, ...]:
        """The products of the layer, in the order in which it computes them."""
        return self.qkv, self.output, self.gate_up, self.down

    @property
    def fits_own_kernels(self) -> bool:
        """Return whether the kernels of ``lean_avx512.h`` fit the layer, which all its products are of."""
        own = all(product.kernel is not None and product.kernel.name == "own" for product in self.products)
        if not own or self.head_dim % 32 or self.head_dim > 256:
            return False
        assert self.gate_up.kernel is not None
        return len(self.gate_up.kernel.tensors[0]) % 2 == 0  # of outputs by 16: gate and up have whole ones

    def in_cpp(self, library: ModuleType) -> Calls | None:
        """Return the same calls from C++, or None where C++ lacks one of them."""
        kernels = [product.kernel for product in self.products]
        changed = "forward" in vars(self.activation)
        if type(self.activation) not in (nn.SiLU, SiLUActivation) or changed or None in kernels:
            return None
        qkv, output, gate_up, down = (library.Product(*kernel) for kernel in kernels if kernel is not None)
        calls: Calls = library.Layer(
            *(self.before_attention.in_cpp(library), qkv, self.qk_norm and self.qk_norm(), self.qk_eps, output),
            *(self.before_mlp.in_cpp(library), gate_up, down, self.heads, self.kv_heads, self.head_dim),
        )
        return calls


class LeanForward:
    """The forward of a model for which :func:`is_lean` holds.

    Args:
        causal_lm: The model.
        take: Whether to take the weights of the model's layers and lay them out for decoding; it cannot run itself
            then. By default its modules keep their weights, and changes to them have effect.
        product_of: Returns the product with a weight that is taken. It is called for each in turn, always in the same
            order.
        library: The compiled calls of a layer, for weights that are taken.
    """

    def __init__(
        self,
        causal_lm: PreTrainedModel,
        take: bool = False,
        product_of: ProductOf = laid_out,
        library: ModuleType | None = None,
    ) -> None:
        base = causal_lm.base_model
        weight = base.embed_tokens.weight
        product = partial(take_weights, product_of=product_of) if take else side_by_side
        self.embed: Callable[[Tensor], Tensor] = base.embed_tokens  # of token ids, [tokens]
        self._rotary = base.rotary_emb
        self._norm = Norm(base.norm, take)
        self._multiple = ROWS if take and can_pack(weight) and product_of is plain else 1
        activation = base.layers[0].mlp.act_fn
        gated = one_kernel(lambda gate, up: activation(gate) * up, weight.device)
        rotated = one_kernel(_rotated, weight.device)
        self._layers = [_layer(layer, product, take, gated, rotated) for layer in base.layers]
        products = (product for layer in self._layers for product in layer.products)
        self._least = max(map(least_rows, products))
        self._like = base.norm.weight  # of the hidden states' size, dtype and device
        self._causal_lm = None if take else causal_lm
        self._modules = list(base.modules())
        usable = library if take and weight.device.type == "cpu" else None  # a GPU has fused kernels that C++ lacks
        compiled = [usable and layer.in_cpp(usable) for layer in self._layers]
        self.is_compiled = None not in compiled  # whether C++ makes the calls of the layers
        self._calls: list[Calls] = [*(compiled if self.is_compiled else self._layers)]
        self._library = usable if self.is_compiled else None
        # whether C++ computes a layer with kernels of its own, attention included
        self._is_own = self.is_compiled and all(layer.fits_own_kernels for layer in self._layers)
        self._drafts: DraftWeights | None = None

    def __call__(self, ids: Tensor, positions: Tensor, packed: Forward) -> Tensor:
        """Return the hidden states after the final norm, ``[tokens, hidden]``.

        Args:
            ids: Token ids, int64 ``[1, tokens]``.
            positions: Position ids, int64 ``[1, tokens]``.
            packed: The forward, which writes K/V and computes attention.
        """
        tokens = ids.shape[-1]
        fill = self._fill(tokens)
        hidden = self.embed(F.pad(ids[0], (0, fill)) if fill else ids[0])
        cos, sin = self._table(positions, hidden)
        calls: Sequence[Calls] = self._calls
        masks: Any = None
        if self._drafts is not None and (found := packed.mask_rows) is not None:
            hidden, calls, masks = self._with_masks(hidden, found)
        if self._is_own and isinstance(packed, PackedForward):
            return self._norm(self._through(hidden, cos, sin, masks, packed))
        for number, (layer, of_layer) in enumerate(zip(self._layers, calls, strict=True)):
            query, key, value = of_layer.before(hidden, tokens, cos, sin, masks)
            out = packed.attend(number, query, key, value, layer.scale)
            hidden = of_layer.after(hidden, out.reshape(tokens, -1), masks)
        return self._norm(hidden)[:tokens]

    def _through(self, hidden: Tensor, cos: Tensor, sin: Tensor, masks: Any, packed: PackedForward) -> Tensor:
        """Return the hidden states after all layers, each of which C++ computes with kernels of its own."""
        assert self._library is not None
        first, parts = self._layers[0], packed.parts
        for part in parts:  # C++ writes where it is told to
            assert 0 <= part.slot < packed.pool.slots
            assert part.length + part.layout.num_tokens <= packed.pool.capacity
        like = hidden.new_empty(1, first.kv_heads, 0, first.head_dim)
        sequences = self._library.Sequences(
            *([part.slot for part in parts], [part.length for part in parts]),
            *([own_mask(part.layout) for part in parts], first.heads // first.kv_heads),
        )
        rooms = packed.pool.rooms(len(self._layers), like)
        through = self._library.through
        out: Tensor = through(self._calls, hidden, cos.contiguous(), sin, masks, sequences, *rooms, first.scale)
        return out

    def use_drafts(self, drafts: DraftWeights) -> None:
        """Let draft weights act on the rows of masks from now on."""
        self._drafts = drafts
        for layer, calls, pairs in zip(self._layers, self._calls, drafts.layers, strict=True):
            layer.pairs.update(pairs)
            if self._library is not None:
                made = [self._library.Pair(*pairs[name]) if name in pairs else None for name in ORDER]
                calls.set_pairs(*made)  # type: ignore[attr-defined]

    def _with_masks(self, hidden: Tensor, masks: MaskRows) -> tuple[Tensor, Sequence[Calls], Any]:
        """Return embeddings with the masks' own input, the calls to make, and the rows of masks as these want them."""
        assert self._drafts is not None
        if isinstance(masks, slice):
            hidden = self._drafts.embed(hidden, masks)
            if self._library is None:
                return hidden, self._layers, masks
            return hidden, self._calls, self._library.Masks(masks.start, masks.stop - masks.start, None)
        masks = masks.to(hidden.device)
        if masks.dtype == torch.bool:  # a static shape
            masks = F.pad(masks, (0, len(hidden) - len(masks)))
            return self._drafts.embed(hidden, masks), self._layers, masks
        hidden = self._drafts.embed(hidden, masks)
        if self._library is None:
            return hidden, self._layers, masks
        return hidden, self._calls, self._library.Masks(0, 0, masks)

    def holds(self) -> bool:
        """Return whether the modules are still those it was made of, and nobody hooked them; always if it took them."""
        causal_lm = self._causal_lm
        return causal_lm is None or (list(causal_lm.base_model.modules()) == self._modules and is_lean(causal_lm))

    def with_padding(self, product: Product) -> Callable[[Tensor], Tensor]:
        """Return the product of rows, to which rows of padding are added where :meth:`_fill` asks for them."""
        of, least = product.of, least_rows(product)

        def padded(rows: Tensor) -> Tensor:
            fill = max(least - len(rows), -len(rows) % self._multiple)
            return of(F.pad(rows, (0, 0, 0, fill)))[: len(rows)] if fill else of(rows)

        return padded

    def _fill(self, tokens: int) -> int:
        """Return how many rows of padding the products of ``tokens`` rows need, so that the bits of a row are its own.

        A packed product needs :data:`~tidar_megatron.inference.products.ROWS`, a plain one on a CPU a multiple of them.
        """
        return max(self._least - tokens, -tokens % self._multiple)

    def bare_products(self, tokens: int) -> Callable[[], None]:
        """Return a function that computes the matrix products of all layers for ``tokens`` rows, and nothing else.

        Its time is the floor of a forward without its output layer.
        """
        first, rows = self._layers[0], tokens + self._fill(tokens)
        hidden = self._like.new_ones(rows, len(self._like))
        heads = self._like.new_ones(rows, first.heads * first.head_dim)
        inner = self._like.new_ones(rows, first.gate_up.of(hidden).shape[-1] // 2)

        def run() -> None:
            for layer in self._layers:
                layer.qkv.of(hidden)
                layer.output.of(heads)
                layer.gate_up.of(hidden)
                layer.down.of(inner)

        return run

    def _table(self, positions: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return cos and sin, ``[1, tokens, D]``; sin has the sign of :func:`_rotated`."""
        cos, sin = self._rotary(hidden, positions)
        return cos, torch.cat([-sin[..., : sin.shape[-1] // 2], sin[..., sin.shape[-1] // 2 :]], -1)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Return queries and keys ``[1, heads, tokens, D]`` with rotary positions, after a norm if there is a ``weight``.

    On a CPU they are bit for bit those of transformers; a GPU rounds less often.
    """
    if weight is not None:
        wide = x.float() if x.dtype in HALF else x
        x = F.rms_norm(wide, weight.shape[-1:], None, eps).to(x.dtype) * weight
    swapped = x.roll(x.shape[-1] // 2, -1)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)  # so that attention needs no copy of the queries
    return torch.mul(x, cos, out=out).add_(swapped.mul_(sin))


def one_kernel(function: Callable[..., Tensor], device: torch.device) -> Callable[..., Tensor]:
    """Return ``function``, compiled to one kernel on a GPU where Triton is installed."""
    if not rounds_once(device) or find_spec("triton") is None:
        return function
    return torch.compile(function, dynamic=True, fullgraph=True)


def _layer(
    layer: nn.Module,
    product: Callable[[list[nn.Linear]], Product],
    fixed: bool,
    gated: Callable[..., Tensor],
    rotated: Callable[..., Tensor],
) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    head_dim, has_norms = attention.head_dim, hasattr(attention, "q_norm")
    heads, kv_heads = (module.out_features // head_dim for module in (attention.q_proj, attention.k_proj))
    return _Layer(
        before_attention=Norm(layer.input_layernorm, fixed),
        qkv=product([attention.q_proj, attention.k_proj, attention.v_proj]),
        qk_norm=_qk_norm(attention, heads, kv_heads, fixed) if has_norms else None,
        qk_eps=attention.q_norm.variance_epsilon if has_norms else 0.0,
        output=product([attention.o_proj]),
        before_mlp=Norm(layer.post_attention_layernorm, fixed),
        gate_up=product([mlp.gate_proj, mlp.up_proj]),
        down=product([mlp.down_proj]),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        scale=attention.scaling,
        activation=mlp.act_fn,
        gated=gated,
        rotated=rotated,
    )


def _qk_norm(attention: nn.Module, heads: int, kv_heads: int, fixed: bool) -> Callable[[], Tensor]:
    """Return a function that gives the weights of Qwen3's norms of q and k; ``fixed`` ones never change."""
    q_norm, k_norm = attention.q_norm, attention.k_norm

    def weights() -> Tensor:
        return torch.cat([q_norm.weight.expand(heads, 1, -1), k_norm.weight.expand(kv_heads, 1, -1)])

    kept = weights() if fixed else None
    return weights if kept is None else lambda: kept
