"""Draft and verify on any Hugging Face causal LM (TiDAR, arXiv 2511.08923, section 3.3).

A prompt becomes a ``sequence``; its policy (``drafting``, ``planner``) says what the next forward holds for it; the
``engine`` puts the parts of all sequences side by side (``attention``, over the K/V of ``cache``), runs the ``model``
once, and each sequence decides what stays (``sampling``). ``text`` turns tokens into text as they come. Nothing here
knows Megatron or training.
"""
