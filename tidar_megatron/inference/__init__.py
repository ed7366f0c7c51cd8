"""Draft and verify in one forward, on any Hugging Face causal LM (TiDAR, arXiv 2511.08923, section 3.3).

``model`` wraps the transformers model, ``attention`` and ``cache`` plug into it, ``drafting`` proposes tokens and
``decoding`` decides about them; ``text`` turns tokens into text as they come. Nothing here knows Megatron or training.
"""
