"""The decoding engine as files in an exported folder, so that transformers alone can decode with drafts."""

import re
from importlib.resources import files
from pathlib import Path

from tidar_megatron import __version__

MODULES = {  # file in the folder -> module of this package; transformers calls the first
    "generate": "inference/custom_generate",
    **{name: f"inference/{name}" for name in ("engine", "sequence", "drafting", "plans", "planner", "planned")},
    **{name: f"inference/{name}" for name in ("choosing", "acceptance", "costs", "static", "forward", "cache")},
    "attention": "inference/attention",
    **{name: f"inference/{name}" for name in ("model", "request", "sampling", "logits", "text", "prepared")},
    **{name: f"inference/{name}" for name in ("wrapping", "compatibility", "upcast", "lean", "products")},
    "draft_weights": "inference/draft_weights",
    "adapters": "inference/adapters",
    "adapter": "adapter",
    "weights": "hf_folder/weights",
    **{name: name for name in ("attention_mask", "attention_kernels", "text_stream", "mask_token", "tidar_section")},
    **{name: name for name in ("errors", "files", "json_files", "precision")},
}


def write_custom_generate(folder: str | Path) -> None:
    """Write ``FOLDER/custom_generate``, which transformers runs if it is called with ``trust_remote_code``."""
    target = Path(folder) / "custom_generate"
    target.mkdir()
    for name in MODULES:
        (target / f"{name}.py").write_text(source_of(name), encoding="utf-8")


def source_of(name: str) -> str:
    """Return the source of a module, rewritten to import the other modules from its own folder.

    Args:
        name: A key of ``MODULES``.
    """
    module = files("tidar_megatron").joinpath(*f"{MODULES[name]}.py".split("/")).read_text(encoding="utf-8")
    module = re.sub(r"(?m)^from tidar_megatron(?:\.\w+)*?\.(\w+) import ", r"from .\1 import ", module)
    about = f"# Copied from tidar-megatron {__version__}, tidar_megatron/{MODULES[name]}.py: change it there.\n"
    return about + module
