"""Reading and writing of Hugging Face folders, tensor by tensor.

Only safetensors are read; no code of a folder is run.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from tidar_megatron.config import Config, ModelConfig
from tidar_megatron.data.tokenizer import load_tokenizer, save_tokenizer
from tidar_megatron.errors import UserError
from tidar_megatron.hf_folder.config import GENERATION_CONFIG, check_raw
from tidar_megatron.hf_folder.weights import INDEX, WEIGHTS, open_safetensors, weight_files
from tidar_megatron.huggingface.exported_engine import write_custom_generate
from tidar_megatron.huggingface.families import huggingface_config, model_from_huggingface, read_json, settled
from tidar_megatron.huggingface.mapping import expected_names, huggingface_names, join, split
from tidar_megatron.huggingface.model_card import write_model_card
from tidar_megatron.huggingface.output_row import mask_output_row
from tidar_megatron.huggingface.streaming import UnshardedModel
from tidar_megatron.huggingface.token_ids import check_mask_token, exported_generation_config
from tidar_megatron.mask_token import MASK_TOKEN
from tidar_megatron.models.parameters import VOCABULARY, kind_of, own_parameters, shard_group
from tidar_megatron.new_folder import check_free, new_folder, os_error

CONFIG = "config.json"
FLOATS = ("BF16", "F16", "F32")  # float32 represents all of their values
SHARD_BYTES = 5 * 10**9  # default size of a file of weights, as in transformers


# --- in ----------------------------------------------------------------------------------------------------------
class Safetensors:
    """The tensors of a folder, read on demand from one file or from an indexed set of files.

    Args:
        folder: A local Hugging Face folder.

    Raises:
        UserError: The folder has no safetensors, or one of its files is missing or broken.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._where: dict[str, Any] = {}
        for file in weight_files(folder, other_names=True):
            handle = open_safetensors(file)
            # old Llama folders store this computed buffer
            names = {name for name in handle.keys() if not name.endswith("rotary_emb.inv_freq")}  # noqa: SIM118
            if twice := sorted(self._where.keys() & names):
                raise UserError(f"{file}: tensor {twice[0]} is also in another file; remove one of the two files")
            self._where |= dict.fromkeys(names, handle)

    def check(self, model: ModelConfig) -> None:
        """Refuse a folder that does not have exactly the tensors of ``model``, in floating point.

        Raises:
            UserError: The message names a tensor that is missing, superfluous, or of another dtype.
        """
        expected = expected_names(model)
        missing = sorted(expected - self._where.keys())
        if missing:
            more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            raise UserError(f"{self.folder}: tensor {missing[0]}{more} is missing from the safetensors")
        tied = set() if model.untie_embeddings_and_output_weights else {"lm_head.weight"}
        extra = sorted(self._where.keys() - expected - tied)
        if extra:
            more = f" (and {len(extra) - 1} more)" if len(extra) > 1 else ""
            raise UserError(f"{self.folder}: tensor {extra[0]}{more} is not part of the model in {CONFIG}")
        for name in sorted(expected):
            if (kind := self._where[name].get_slice(name).get_dtype()) not in FLOATS:
                wanted = ", ".join(FLOATS)
                raise UserError(
                    f"{self.folder}: tensor {name} has dtype {kind}, not one of {wanted}; save it in one of them, "
                    "without quantization"
                )
        if tied & self._where.keys() and not self._same("model.embed_tokens.weight", "lm_head.weight"):
            raise UserError(
                f"{self.folder}: lm_head.weight differs from embed_tokens.weight, although {CONFIG} ties them; "
                'set "tie_word_embeddings": false there if the model has both'
            )

    def _same(self, name: str, other: str, rows: int = 4096) -> bool:
        """Return whether two tensors are equal, reading ``rows`` rows of each at a time."""
        one, two = (self._where[tensor].get_slice(tensor) for tensor in (name, other))
        if one.get_shape() != two.get_shape() or one.get_dtype() != two.get_dtype():
            return False
        starts = range(0, one.get_shape()[0], rows)
        return all(torch.equal(one[at : at + rows], two[at : at + rows]) for at in starts)

    def dtypes(self) -> set[str]:
        """Return the dtypes of the tensors, as safetensors names them: BF16, F32, ..."""
        return {handle.get_slice(name).get_dtype() for name, handle in self._where.items()}

    def read(self, name: str) -> Tensor:
        """Return a tensor.

        Raises:
            UserError: There is no tensor of this name, or it has values that are NaN or infinite.
        """
        if name not in self._where:
            raise UserError(f"{self.folder}: tensor {name} is missing from the safetensors")
        tensor = self._where[name].get_tensor(name)
        # minimum and maximum are NaN if any value is, and take no memory
        if tensor.numel() and not all(extreme.isfinite() for extreme in tensor.aminmax()):
            raise UserError(f"{self.folder}: tensor {name} has values that are NaN or infinite; save the model again")
        return tensor

    def check_shapes(self, unsharded: UnshardedModel, model: ModelConfig) -> None:
        """Refuse tensors whose shapes do not fit the model, without reading a tensor.

        Args:
            unsharded: Our model.
            model: The folder's model configuration.

        Raises:
            UserError: The message names the first tensor that does not fit.
        """

        def outline(name: str) -> Tensor:
            return torch.empty(self._where[name].get_slice(name).get_shape(), device="meta")

        for name, shape in unsharded.shapes.items():
            self.parameter(name, model, shape, outline)

    def parameter(
        self,
        name: str,
        model: ModelConfig,
        shape: torch.Size | tuple[int, ...],
        read: Callable[[str], Tensor] | None = None,
    ) -> Tensor:
        """Return a full (unsharded) megatron-core parameter, made from one or several tensors.

        Args:
            name: The parameter's name in the full model.
            model: The folder's model configuration.
            shape: The shape it must have; a shorter vocabulary is padded with rows of zeros.
            read: A function that returns a tensor by name; by default :meth:`read`.

        Raises:
            UserError: A tensor is missing, or does not fit.
        """
        read = read or self.read
        kind, numbers = kind_of(name)
        names = huggingface_names(kind, numbers)
        tensors = [read(hf) for hf in names]
        try:
            full = join(kind, tensors, model.num_query_groups or model.num_attention_heads)
        except RuntimeError:
            full = torch.empty(0)  # heads that do not divide, or parts of unequal width: reported below
        if name in VOCABULARY and full.dim() == 2 and len(full) == model.vocab_size and len(full) < shape[0]:
            full = torch.cat([full, full.new_zeros(shape[0] - len(full), full.shape[1])])
        if full.shape != shape:
            found = ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
            raise UserError(f"{self.folder}: {names[0]} does not fit the model in {CONFIG}: {found}; correct {CONFIG}")
        return full


def has_tokenizer(folder: str | Path) -> bool:
    """Return whether a folder has a tokenizer.json; a folder without any tokenizer is valid.

    Raises:
        UserError: The folder has a tokenizer only in an older format, which is not supported.
    """
    folder = Path(folder)
    if (folder / "tokenizer.json").exists():
        return True
    for name in ("tokenizer.model", "vocab.json", "vocab.txt"):
        if (folder / name).exists():
            raise UserError(
                f"{folder}: has {name} but no tokenizer.json; "
                "create it with transformers: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
            )
    return False


def check_huggingface_tokenizer(folder: str | Path, data_tokenizer: str | Path) -> None:
    """Refuse data that was not prepared with the model's tokenizer; accept a model without a tokenizer.

    Args:
        folder: The model's folder.
        data_tokenizer: The folder of the data's tokenizer.

    Raises:
        UserError: The vocabularies differ, apart from the name of our mask token.
    """
    if not has_tokenizer(folder):
        return
    theirs, ours = (load_tokenizer(path).get_vocab() for path in (folder, data_tokenizer))
    for vocabulary in (theirs, ours):
        vocabulary.pop(MASK_TOKEN, None)
    if theirs != ours:
        raise UserError(
            f"--init-from {folder}: its tokenizer differs from the data's; prepare the data with --tokenizer {folder}"
        )


@torch.no_grad()
def load_huggingface_weights(chunks: list[GPTModel], folder: str | Path, model: ModelConfig) -> None:
    """Load this rank's part of the model from a Hugging Face folder; rows beyond its vocabulary become zeros.

    Args:
        chunks: This rank's model chunks, which are filled in place.
        folder: The Hugging Face folder.
        model: The folder's model configuration, including its vocabulary size.

    Raises:
        UserError: The folder's tensors are missing, broken, or do not fit.
    """
    source = Safetensors(folder)
    source.check(model)
    for name, parameter, chunk in own_parameters(chunks):
        group, (kind, _) = shard_group(chunk, name), kind_of(name)
        full = source.parameter(name, model, tuple(kind.full_shape(parameter.shape, group.size())))
        parameter.copy_(kind.part(full, group.rank(), group.size()))


# --- out ---------------------------------------------------------------------------------------------------------
def export_huggingface(
    unsharded: UnshardedModel,
    read: Callable[[str], Tensor],
    config: Config,
    tokenizer: Any,
    folder: str | Path,
    source: str | Path | None = None,
    shard_bytes: int = SHARD_BYTES,
    keep_mask_row: bool = False,
) -> None:
    """Write a model as a Hugging Face folder, atomically: config, safetensors, tokenizer, the engine, a model card.

    Args:
        unsharded: The model's parameter names and shapes.
        read: A function that returns a full parameter by its name in the model.
        config: The resolved configuration.
        tokenizer: The transformers tokenizer that the model was trained with, or None.
        folder: The folder to write; it must not exist, or must be empty.
        source: A folder with the ``config.json`` and ``generation_config.json`` that the model was imported from.
        shard_bytes: The approximate size of a file of weights.
        keep_mask_row: Whether to keep the mask token's row of an untied output layer, instead of replacing it by one
            whose logit is never the largest (:func:`mask_output_row`).

    Raises:
        UserError: ``folder`` cannot be written or is not empty, the files in ``source`` are invalid, or the mask token
            has another meaning there. ``folder`` is unchanged then.
    """
    check_free("--hf", folder)
    eos_token_id = tokenizer.eos_token_id if tokenizer is not None else None
    before = None
    if source is not None:
        before = read_json(Path(source) / CONFIG)
        check_raw(before, Path(source) / CONFIG)
    hf_config = huggingface_config(config, eos_token_id, before)
    mask = config.tidar.mask_token_id
    generation = exported_generation_config(hf_config.get("eos_token_id"), mask, source)
    untied = config.model.untie_embeddings_and_output_weights

    def exported(name: str) -> Tensor:
        tensor = read(name)[: hf_config["vocab_size"]] if name in VOCABULARY else read(name)
        if mask is not None and name == VOCABULARY[1] and not keep_mask_row:
            tensor[mask] = mask_output_row(tensor, mask)
        return tensor

    with new_folder("--hf", folder, CONFIG) as hf:
        _write_json(hf / CONFIG, hf_config)
        _write_json(hf / GENERATION_CONFIG, generation)
        check_mask_token(hf, mask, tokenizer, shown=folder)
        if settled(model_from_huggingface(hf, config.model)) != settled(config.model):
            raise UserError(f"{source}: its {CONFIG} has settings that would change the exported model; remove them")
        _write_weights(unsharded, exported, hf, shard_bytes)
        write_custom_generate(hf)
        row = "tied" if not untied else "kept" if keep_mask_row else "mean"
        write_model_card(hf, Path(folder).resolve().name, hf_config, row)
        if tokenizer is not None:
            if len(tokenizer) == config.tidar.mask_token_id:  # the next free id: the mask token gets its name
                tokenizer.add_tokens([MASK_TOKEN], special_tokens=True)
            save_tokenizer(tokenizer, hf)


def check_exportable(config: Config, eos_token_id: int | None, files: Path | None) -> None:
    """Refuse a model that :func:`export_huggingface` would refuse, before it is trained.

    Args:
        config: The complete configuration.
        eos_token_id: The end-of-text id of the run's tokenizer.
        files: The folder of the ``config.json`` that the export is based on, or None.

    Raises:
        UserError: The model has no Hugging Face class, or its mask token has another meaning in ``files``.
    """
    huggingface_config(config, eos_token_id, read_json(files / CONFIG) if files is not None else None)
    if files is not None:
        check_mask_token(files, config.tidar.mask_token_id)


def _write_weights(unsharded: UnshardedModel, read: Callable[[str], Tensor], folder: Path, shard_bytes: int) -> None:
    shards: list[list[str]] = [[]]
    held = total = 0  # bytes
    for name, shape in unsharded.shapes.items():
        size = shape.numel() * unsharded.pieces[name][0].dtype.itemsize
        if shards[-1] and held + size > shard_bytes:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += size
    where: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = WEIGHTS if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weights: dict[str, Tensor] = {}
        for name in names:
            kind, numbers = kind_of(name)
            parts = split(kind, read(name), unsharded.num_query_groups, unsharded.num_attention_heads)
            for hf, part in zip(huggingface_names(kind, numbers), parts, strict=True):
                weights[hf] = part.contiguous()
                total += part.nbytes
        try:
            save_file(weights, folder / file, metadata={"format": "pt"})
        except SafetensorError as error:
            raise os_error(error) from error
        where |= dict.fromkeys(weights, file)
    if len(shards) > 1:
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": where})


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
