"""From text to the batches a step consumes; knows no model and no Megatron.

===============  ====================================================================================
``tokenizer``    one kind of tokenizer: bytes, a trained byte-level BPE, a Hugging Face folder
``texts``        documents of text from files, folders and JSON lines
``prepare``      text -> shards, training and held-out (``tools/prepare_data.py``)
``manifest``     what a folder of shards promises: counts, sizes, hashes, the tokenizer
``shard_writer`` documents -> token arrays in webdataset tars, written whole or not at all
``shards``       the documents of such tars, read with suspicion
``packing``      packed sequence n of an epoch: a pure function of (seed, epoch, n)
``blocks``       which blocks of packed sequence n have masks: a pure function of (seed, n)
``doubled``      packed sequences -> the doubled sequence: tokens, labels, visibility, loss weights
``loader``       the above for one data-parallel rank; its only state is the number of sequences consumed
``prefetch``     the next step's batches, built by a background thread
===============  ====================================================================================

New sources of documents (Megatron's ``.bin/.idx``, an offset index over tars, blends) belong beside ``shards``:
whatever has ``lengths`` and ``documents[i]`` can be packed.
"""
