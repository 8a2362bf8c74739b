"""Compiling the kernels beforehand: `engram-lm compile`, part of `make setup`, so that no first search or request waits.

A kernel is compiled for the types of its arguments, and what calls it knows these best: so each part of `work` is a small
piece of real work, and `command` runs the parts in processes side by side. What is compiled already is only loaded.
"""
