"""Conversion between Hugging Face folders and runs, and the files of an exported folder."""
