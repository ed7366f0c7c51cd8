"""The energy of decoding: what the processor's counters say, or else the bytes read and the FLOPs, computed.

Linux has the counters of Intel and AMD (RAPL) in ``/sys/class/powercap``; often only root may read them.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from tidar_megatron.inference.model import DecodeModel
from tidar_megatron.inference.quantizing import bits_of

POWERCAP = Path("/sys/class/powercap")


class Rapl:
    """The energy counters of all processor packages, and of memory where it has its own.

    Attributes:
        names: What is counted, such as ``package-0``.
    """

    def __init__(self, zones: list[Path]) -> None:
        self._counters = [zone / "energy_uj" for zone in zones]
        self._ranges = [int((zone / "max_energy_range_uj").read_text()) for zone in zones]
        self.names = [(zone / "name").read_text().strip() for zone in zones]

    @classmethod
    def find(cls, folder: Path = POWERCAP) -> "Rapl | None":
        """Return the counters of this machine, or None if there are none that can be read."""
        try:
            names = {zone: (zone / "name").read_text().strip() for zone in sorted(folder.glob("intel-rapl:*"))}
            zones = [zone for zone, name in names.items() if name.startswith("package") or name == "dram"]
            found = cls(zones)
            found.read()
        except (OSError, ValueError):
            return None
        return found if zones else None

    def read(self) -> list[int]:
        """Return the microjoules of each counter."""
        return [int(counter.read_text()) for counter in self._counters]

    def joules_since(self, before: list[int]) -> float:
        """Return the joules since :meth:`read` returned ``before``; a counter may have wrapped around once."""
        spent = zip(before, self.read(), self._ranges, strict=True)
        return sum((now - then) % (largest + 1) for then, now, largest in spent) / 1e6


@dataclass(frozen=True)
class Sizes:
    """The sizes of a model that say what a forward reads and computes.

    Attributes:
        weights: Elements of the layers' matrices.
        output_weights: Elements of the output layer.
        weight_bytes: Bytes of both.
        kv_bytes: Bytes of K and V of one token, all layers.
        flops_per_pair: FLOPs of attention for each pair of a query and a key, all layers.
    """

    weights: int
    output_weights: int
    weight_bytes: int
    kv_bytes: int
    flops_per_pair: int

    @classmethod
    def of(cls, model: DecodeModel) -> "Sizes":
        """Return the sizes of a dense model whose K/V are stored in its dtype, and its weights too or quantized."""
        config = model.causal_lm.config.get_text_config()
        matrices = [module for module in model.causal_lm.base_model.modules() if isinstance(module, nn.Linear)]
        weights = sum(module.in_features * module.out_features for module in matrices)
        output = config.vocab_size * config.hidden_size
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        layers, size = config.num_hidden_layers, model.dtype.itemsize
        kv_bytes = 2 * layers * kv_heads * head_dim * size
        bits, output_bits = bits_of(model.quantize, 8 * size)
        weight_bytes = (bits * weights + output_bits * output) // 8
        return cls(weights, output, weight_bytes, kv_bytes, 4 * layers * heads * head_dim)


@dataclass
class Work:
    """The least that forwards read and compute: weights once a forward, K/V once a sequence, two FLOPs per weight.

    Norms, activations and the rows of the embedding are left out.
    """

    sizes: Sizes
    bytes_read: int = 0
    flops: int = 0

    def add(self, sequences: Iterable[tuple[int, int]], rows: int) -> None:
        """Add a forward.

        Args:
            sequences: For each sequence, the tokens before the forward and its tokens in it.
            rows: The rows of the output layer, all sequences together.
        """
        sizes = self.sizes
        self.bytes_read += sizes.weight_bytes
        self.flops += 2 * sizes.output_weights * rows
        for before, tokens in sequences:
            self.bytes_read += (before + tokens) * sizes.kv_bytes
            self.flops += 2 * sizes.weights * tokens + sizes.flops_per_pair * tokens * (before + tokens)
