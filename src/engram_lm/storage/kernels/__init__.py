"""Compiled functions of storage: rows copied, decoded and read from disk, maps and sets of rows."""
