"""tidar-megatron: Megatron-style pretraining, and draft/verify inference, for TiDAR (arXiv 2511.08923).

The floors of the house, lowest first; a file imports only from lower floors, or downward within its own
folder (``tests/test_floors.py`` enforces it):

F0  ``errors``, ``attention_mask`` (who may attend to whom), ``config``
F1  ``distributed`` (process groups, a machine without a GPU), ``data`` (shards -> doubled sequence),
    ``inference`` (draft and verify on any Hugging Face causal LM; knows nothing of Megatron)
F2  ``models`` (hybrid attention, the GPTModel spec, the losses)
F3  ``checkpoint`` (distributed checkpoints, Hugging Face import and export)
F4  ``training`` (optimizer, step, evaluation, the loop)
"""

__version__ = "0.1.0"
