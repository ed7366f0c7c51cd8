"""What is read from a Hugging Face folder passes here: each file is checked before transformers is given it."""
