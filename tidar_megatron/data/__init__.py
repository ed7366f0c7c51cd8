"""From text to the batches a step consumes; knows no model and, but for its ``.idx`` files, no Megatron.

====================  ===============================================================================
``tokenizer``         one kind of tokenizer: bytes, a trained byte-level BPE, a Hugging Face folder
``texts``             documents of text from files, folders and JSON lines
``text_streams``      opens a file of text, also a compressed one
``json_rows``         rows of text in JSON lines and JSON arrays
``plain_text``        text -> ids, none of them special
``prepare``           text -> shards, training and held-out (``tools/prepare_data.py``)
``manifest``          what a folder of shards promises: counts, sizes, hashes, the tokenizer
``shard_writer``      documents -> token arrays in webdataset tars, written whole or not at all
``index``             where each document lies, in a file that is built once
``documents``         documents on the disk, read when they are sliced; what both kinds of source are:
``shards``            folders of such tars, checked with suspicion when their index is built
``megatron_indexed``  Megatron's ``.bin/.idx`` pairs, checked likewise
``sources``           opens either
``blend``             which source packed sequence n comes from: a pure function of n
``order``             random orders, as a whole or pointwise
``packing``           packed sequence n of an epoch: a pure function of (seed, epoch, n)
``blocks``            which blocks of packed sequence n have masks: a pure function of (seed, n)
``doubled``           packed sequences -> the doubled sequence: tokens, labels, visibility, loss weights
``loader``            the above for one data-parallel rank; its only state is the number of sequences consumed
``prefetch``          the next steps' batches, built by background threads
``inspect``           a look into data (``tools/inspect_data.py``)
====================  ===============================================================================

A new kind of source is a subclass of ``documents.StoredDocuments``: files, and a function that finds what lies where.
"""
