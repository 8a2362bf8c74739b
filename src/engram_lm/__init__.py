"""Engram: memory for language models that is looked up, not computed."""

__version__ = "0.1.0"
