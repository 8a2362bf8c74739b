"""The Engram layer and its parts: gate, short conv, LongCat's mean, and decoding state."""

from engram_lm.nn.cache import ABSENT, MemoryState, Window
from engram_lm.nn.conv import short_conv, short_conv_plain
from engram_lm.nn.gate import gate, gate_plain
from engram_lm.nn.layer import EngramLayer, LayerOutput
from engram_lm.nn.mean import EmbeddingMean

__all__ = [
    "ABSENT",
    "EmbeddingMean",
    "EngramLayer",
    "LayerOutput",
    "MemoryState",
    "Window",
    "gate",
    "gate_plain",
    "short_conv",
    "short_conv_plain",
]
