"""The files of an adapter: the draft weights of a frozen model, in a folder of their own or in the model's.

- ``draft_config.json``: sizes, and the hash of the base model's tensors;
- ``draft_weights.safetensors``: ``mask_embedding [h]``; ``layers.N.{qkv,o,gate_up,down}.{a,b}``, where a is
  ``[rank, inputs]`` and b ``[outputs, rank]`` (q above k above v, gate above up); ``selector.*``.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tidar_megatron.errors import UserError
from tidar_megatron.hf_folder.weights import DRAFT_WEIGHTS, open_safetensors, stored_tensors
from tidar_megatron.json_files import not_a_file, read_object

CONFIG, WEIGHTS = "draft_config.json", DRAFT_WEIGHTS
FORMAT = 1
CANDIDATES = 16  # the likeliest tokens of a mask that the selector scores
SELECTOR_SCALE = 4.0  # what a candidate gains is multiplied by this over the root of the selector's rank
MODULES = {  # megatron-core's linear layers -> the names in the file
    "self_attention.linear_qkv": "qkv",
    "self_attention.linear_proj": "o",
    "mlp.linear_fc1": "gate_up",
    "mlp.linear_fc2": "down",
}


@dataclass(frozen=True)
class AdapterConfig:
    """The contents of ``draft_config.json``.

    Attributes:
        base_sha256: :func:`weights_hash` of the base model's folder.
        block_size: B, the largest K.
        rank, alpha: A pair adds ``alpha / rank * b @ a`` to a linear layer.
        modules: The linear layers that have a pair, by their names in the file.
        selector_rank: The rank of the selector; 0 if there is none.
        num_layers, hidden_size, vocab_size: The sizes of the base model.
        format: The version of the files.
    """

    base_sha256: str
    block_size: int
    rank: int
    alpha: float
    modules: list[str]
    selector_rank: int
    num_layers: int
    hidden_size: int
    vocab_size: int
    format: int = FORMAT

    @property
    def scale(self) -> float:
        """The factor on the product of a pair."""
        return self.alpha / self.rank


@dataclass(frozen=True)
class Adapter:
    """An adapter in memory."""

    config: AdapterConfig
    tensors: dict[str, Tensor]

    def save(self, folder: Path) -> None:
        """Write both files into a folder that exists.

        Raises:
            OSError: They cannot be written.
        """
        save_file({name: tensor.contiguous() for name, tensor in self.tensors.items()}, str(folder / WEIGHTS))
        (folder / CONFIG).write_text(json.dumps(asdict(self.config), indent=2) + "\n", encoding="utf-8")

    def truncated(self, rank: int) -> "Adapter":
        """Return an adapter whose pairs have a smaller rank: each product's best approximation, from its SVD.

        A multiple of 16 decodes faster (``lean.cpp``).

        Raises:
            UserError: The rank is not smaller than the adapter's, or than the layers'.
        """
        config = self.config
        widths = [tensor.numel() // config.rank for name, tensor in self.tensors.items() if name.endswith((".a", ".b"))]
        limit = min(config.rank, *widths)
        if not 1 <= rank < limit:
            raise UserError(f"--draft-rank {rank}: must be at least 1 and below {limit}, the rank in training")
        tensors = dict(self.tensors)
        for name in [name.removesuffix(".a") for name in tensors if name.endswith(".a")]:
            a, b = (tensors[f"{name}.{part}"].double() for part in "ab")
            (right, of_a), (left, of_b) = torch.linalg.qr(a.t()), torch.linalg.qr(b)
            u, sizes, v = torch.linalg.svd(of_b @ of_a.t())
            root = sizes[:rank].sqrt()
            for part, full in (("a", root[:, None] * (v[:rank] @ right.t())), ("b", left @ u[:, :rank] * root)):
                tensors[f"{name}.{part}"] = full.to(self.tensors[f"{name}.{part}"].dtype)
        return Adapter(replace(config, rank=rank, alpha=config.scale * rank), tensors)

    def shapes(self, inputs: dict[str, int], outputs: dict[str, int]) -> dict[str, tuple[int, ...]]:
        """Return the shape of each tensor, given the widths of the base model's linear layers by name."""
        config, h = self.config, self.config.hidden_size
        wanted: dict[str, tuple[int, ...]] = {"mask_embedding": (h,)}
        for layer in range(config.num_layers):
            for name in config.modules:
                wanted[f"layers.{layer}.{name}.a"] = config.rank, inputs[name]
                wanted[f"layers.{layer}.{name}.b"] = outputs[name], config.rank
        if config.selector_rank:
            wanted |= {f"selector.{name}": (config.selector_rank, h) for name in ("previous", "candidate", "gate")}
            wanted["selector.gate_bias"] = (config.selector_rank,)
        return wanted


def read_adapter(folder: str | Path) -> Adapter:
    """Read an adapter's folder.

    Raises:
        UserError: A file is missing or broken.
    """
    folder = Path(folder)
    for name in (CONFIG, WEIGHTS):
        if problem := not_a_file(folder / name):
            raise UserError(f"--adapter {folder}: {name} {problem}; tidar convert export writes an adapter's folder")
    given = read_object(folder / CONFIG)
    if given.get("format") != FORMAT:
        raise UserError(f"{folder / CONFIG}: format {given.get('format')!r}, and this version reads {FORMAT}")
    try:
        config = AdapterConfig(**given)
        numbers = config.block_size, config.rank, config.num_layers, config.hidden_size, config.vocab_size
        sound = all(isinstance(n, int) and n > 0 for n in numbers) and config.alpha > 0 and config.selector_rank >= 0
        sound = sound and set(config.modules) <= set(MODULES.values()) and isinstance(config.base_sha256, str)
    except TypeError:
        sound = False
    if not sound:
        raise UserError(f"{folder / CONFIG}: is not an adapter's configuration; export it again")
    open_safetensors(folder / WEIGHTS)
    return Adapter(config, load_file(str(folder / WEIGHTS)))


def weights_hash(folder: str | Path) -> str:
    """Return the SHA-256 of a folder's tensors: their names, dtypes, shapes and bytes, whatever files they are in.

    Raises:
        UserError: There are no safetensors, or a file is broken.
    """
    total = hashlib.sha256()
    handles = {}
    for name, stored in sorted(stored_tensors(folder, other_names=True).items()):
        if stored.file not in handles:
            handles[stored.file] = open_safetensors(stored.file)
        total.update(f"{name} {stored.dtype} {list(stored.shape)}\n".encode())
        tensor = handles[stored.file].get_tensor(name).contiguous()
        total.update(tensor.flatten().view(torch.uint8).numpy())
    return total.hexdigest()
