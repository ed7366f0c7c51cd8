"""Hugging Face folders and runs, in both directions; the files that an exported folder carries."""
