"""Draft and verify on any Hugging Face causal LM (TiDAR, arXiv 2511.08923, section 3.3).

A prompt becomes a ``sequence``. Its policy (``drafting``, ``planner``) says what the next forward holds for it. The
``engine`` puts the parts of all sequences side by side (``forward``, over the K/V of ``cache``) and runs the ``model``
once; each sequence then decides what stays (``sampling``). ``text`` and ``text_stream`` turn tokens into text as they
come. Nothing here knows Megatron or training.
"""
