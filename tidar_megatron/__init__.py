"""tidar-megatron: Megatron-style pretraining, and draft/verify inference, for TiDAR (arXiv 2511.08923).

The Python API. A name is imported from its module when it is first used, so ``import tidar_megatron`` is quick.

=====================  ============================================================================================
``load_model``         load a Hugging Face folder for decoding
``encode_prompt``      text -> the token ids of a prompt
``generate``           continue one prompt, and return a ``Generation``: tokens, figures, why it ended
``stream``             the same, one ``Step`` for each forward, as it comes
``generate_batch``     continue many prompts together; each gets the tokens that it gets alone
``continuation``       token ids behind a prompt -> text
``TextStream``         the same, piece by piece
``DecodeOptions``      how to generate; ``SamplingOptions``: how the next token is drawn; the default is greedy
``parse_plan``         options by the name of a plan: auto, ar, linear:8, lookup:8, all:8, 2:8
``Engine``             a queue of requests that share each forward, for a server
``prepare``            text -> training shards
``load_config``        a YAML file -> the configuration of a run
``pretrain``           train by a configuration, in one process or as one rank of torchrun
``import_run``         a Hugging Face folder -> a run to start from
``export_run``         a run's checkpoint -> a Hugging Face folder
``UserError``          what all of them raise for bad input, in one line
=====================  ============================================================================================
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tidar_megatron.config.reader import load_config
    from tidar_megatron.data.prepare import prepare
    from tidar_megatron.errors import UserError
    from tidar_megatron.huggingface.convert import export_run, import_run
    from tidar_megatron.inference.engine import Engine, generate, generate_batch, stream
    from tidar_megatron.inference.loading import load_model
    from tidar_megatron.inference.request import DecodeOptions, Generation, Step, parse_plan
    from tidar_megatron.inference.sampling import SamplingOptions
    from tidar_megatron.inference.text import TextStream, continuation, encode_prompt
    from tidar_megatron.training.loop import pretrain

__version__ = "0.1.0"

__all__ = [
    "DecodeOptions",
    "Engine",
    "Generation",
    "SamplingOptions",
    "Step",
    "TextStream",
    "UserError",
    "continuation",
    "encode_prompt",
    "export_run",
    "generate",
    "generate_batch",
    "import_run",
    "load_config",
    "load_model",
    "parse_plan",
    "prepare",
    "pretrain",
    "stream",
]

_MODULES = {
    "config.reader": ("load_config",),
    "data.prepare": ("prepare",),
    "errors": ("UserError",),
    "huggingface.convert": ("export_run", "import_run"),
    "inference.engine": ("Engine", "generate", "generate_batch", "stream"),
    "inference.loading": ("load_model",),
    "inference.request": ("DecodeOptions", "Generation", "Step", "parse_plan"),
    "inference.sampling": ("SamplingOptions",),
    "inference.text": ("TextStream", "continuation", "encode_prompt"),
    "training.loop": ("pretrain",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


if not TYPE_CHECKING:  # a type checker is to find names that do not exist

    def __getattr__(name: str) -> Any:
        """Import a name of the API when it is first used.

        Raises:
            AttributeError: the package has no such name.
        """
        if name not in _MODULE_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
        globals()[name] = value  # the next use finds it without this function
        return value


def __dir__() -> list[str]:
    """Return the names of the module, those of the API that are not yet imported among them."""
    return sorted({*globals(), *__all__})
