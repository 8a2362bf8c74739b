"""Compiled functions of the index: sorting, searching, counting and discounting. The plain twin is `index.plain`."""
