"""Reading of Hugging Face folders: each file is checked before transformers loads it."""
