"""Ablations: the same training with memory, with controls that lack one part of it, and with what one would do instead.

from engram_lm.ablation.arms import control
attach(model, tokenizer, control(MemoryConfig(layers=(1, 5)), "one-row"))
"""
