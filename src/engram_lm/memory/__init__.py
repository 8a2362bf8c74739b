"""A memory without a model: what it is built from, how it reads, what may intervene, where its rows lie, what its files say.

    memory = build_memory(config, ModelShape(...), tokenizer, like=parameter)     # build.py
    call = MemoryCall(memory, window)                                             # memory.py: addresses, reads on their way
    hidden = hidden + memory.slots[0](hidden, call).delta                         # layer.py

    interventions.py   what is read in place of a memory's own rows; controls.py: memories that lack something
    overlay.py         changed rows over any table, for a request or for some sequences of a batch
    placement.py       which tier rows lie on; rows.py: the rows inside a saved memory; manifest.py, card.py: its files
    record.py          what a layer did, as plain numbers

It takes hidden states and token ids and knows no transformers: `engram_lm.attachment` puts it into their models.
"""
