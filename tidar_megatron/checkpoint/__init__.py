"""A run's own checkpoints: write, publish, verify, and load them in any layout."""
