"""A run's own checkpoints: written, published, verified, loaded in any layout."""
