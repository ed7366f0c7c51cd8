"""Draft and verify on any Hugging Face causal LM (TiDAR, arXiv 2511.08923, section 3.3).

A prompt becomes a ``sequence``, and its policy (``drafting``, ``planner``) lays out its part of the next forward. The
``engine`` packs the parts of all sequences side by side (``forward``, over the K/V of ``cache``) and runs the ``model``
once. Each sequence then decides which drafts to accept (``sampling``). ``text`` and ``text_stream`` turn tokens into
text as they arrive. This package does not depend on Megatron or on the training code.
"""
