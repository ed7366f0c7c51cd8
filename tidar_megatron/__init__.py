"""tidar-megatron: Megatron-style pretraining, and draft/verify inference, for TiDAR (arXiv 2511.08923)."""

__version__ = "0.1.0"
