"""The model card of an exported folder: its ``README.md``, with metadata for the Hugging Face Hub."""

from pathlib import Path
from typing import Any

from tidar_megatron import __version__
from tidar_megatron.huggingface.output_row import rows_mixed

CARD = "README.md"

HEAD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags:
{tags}
---

# {name}

A {architecture} of {layers} layers, hidden size {hidden} and {vocabulary:,} token ids, exported by tidar-megatron
{version}. No license is given here: add one before you publish the folder.
"""

TIDAR = """
The model is a TiDAR model ([arXiv 2511.08923](https://arxiv.org/abs/2511.08923)): an ordinary autoregressive language
model that has also learned to draft up to {block_size} tokens ahead, from mask tokens (id {mask}) in its input. Each
forward verifies the drafts of the one before, so they change the speed and not the text.

## Decode with drafts

With tidar-megatron:

```bash
python tools/generate.py --model FOLDER --prompt "..."
```

With transformers alone, by the engine in `custom_generate/`:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = AutoModelForCausalLM.from_pretrained("FOLDER"), AutoTokenizer.from_pretrained("FOLDER")
inputs = tokenizer("...", return_tensors="pt"{no_special})
output = model.generate(**inputs, custom_generate="FOLDER", trust_remote_code=True)
```

## Decode without drafts

Any engine that runs a {architecture} decodes the folder one token at a time: transformers, vLLM, llama.cpp.

## The mask token is no text

The mask token (id {mask}) is an input. No text has it, and a decoder must not emit it.

- tidar-megatron and `custom_generate` never emit it.
- transformers' `generate` reads `suppress_tokens` in `generation_config.json`, which forbids it.
- Other engines do not read that setting. {head}

To forbid it in another engine:

- vLLM: `SamplingParams(logit_bias={{{mask}: -100}})`, or `"logit_bias": {{"{mask}": -100}}` in a request to its server.
- llama.cpp: `--logit-bias {mask}-100`, or `"logit_bias": [[{mask}, false]]` in a request to its server.
"""
TIED = """Its output row is its embedding (the two are tied), so nothing in
  the weights forbids it: use their own setting."""
UNTIED = """Its output row is the mean of {mixed:,} others, so its logit
  is never the largest: greedy decoding does not emit it. Sampling can, with a probability of at most 1 in {bound:,}
  whatever the temperature, and far less on text: forbid it there."""
KEPT = """Its output row came with the folder that this model was imported
  from and was not changed: use their own setting."""

PLAIN = """
It has no mask token and drafts nothing: decode it as any other {architecture}.
"""


def write_model_card(folder: Path, name: str, hf_config: dict[str, Any], row: str) -> None:
    """Write the model card, ``FOLDER/README.md``.

    Args:
        folder: The exported folder.
        name: The heading.
        hf_config: The content of the folder's ``config.json``.
        row: The kind of the mask token's row in the output layer: ``tied`` (to its embedding), ``mean`` (of other rows)
            or ``kept`` (from the imported model).
    """
    tidar, architecture = hf_config.get("tidar"), hf_config["architectures"][0]
    tags = ["tidar", "speculative-decoding"] if tidar else ["tidar-megatron"]
    text = HEAD.format(
        tags="\n".join(f"  - {tag}" for tag in tags),
        name=name,
        architecture=architecture,
        layers=hf_config["num_hidden_layers"],
        hidden=hf_config["hidden_size"],
        vocabulary=hf_config["vocab_size"],
        version=__version__,
    )
    if tidar:
        mixed = rows_mixed(hf_config["vocab_size"])
        head = {"tied": TIED, "mean": UNTIED, "kept": KEPT}[row].format(mixed=mixed, bound=mixed + 1)
        text += TIDAR.format(
            architecture=architecture,
            block_size=tidar["block_size"],
            mask=tidar["mask_token_id"],
            head=head,
            no_special=", add_special_tokens=False",
        )
    else:
        text += PLAIN.format(architecture=architecture)
    (folder / CARD).write_text(text, encoding="utf-8")
