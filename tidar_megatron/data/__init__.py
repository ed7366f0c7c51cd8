"""The path from text to the batches that a training step consumes.

This package does not depend on models, and on Megatron only to read ``.idx`` files. To add a new kind of source,
subclass ``documents.StoredDocuments``: it takes the files and an index of where each document begins.
"""
