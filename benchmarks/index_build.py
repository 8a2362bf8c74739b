"""Build one segment of the tokens of `index.py`, in a process of its own, so that its memory can be watched.

python benchmarks/index_build.py TOKENS.npy STARTS.npy OUT.segment [vocab_size]
"""

import json
import sys
import time

import numpy as np

from engram_lm.index.segment import Document, write_segment


def documents(tokens, starts):
    """Read one after the other, as a builder would; what a mapped file holds would count as memory of this process."""
    starts_D1 = np.load(starts)
    with open(tokens, "rb") as file:
        version = np.lib.format.read_magic(file)
        read_header = getattr(np.lib.format, f"read_array_header_{version[0]}_0")
        _, _, dtype = read_header(file)
        for number, size in enumerate(np.diff(starts_D1)):
            yield Document(id=str(number)), np.fromfile(file, dtype, int(size))


def main():
    tokens, starts, out = sys.argv[1:4]
    vocab_size = int(sys.argv[4]) if len(sys.argv) > 4 else 49_152
    start = time.perf_counter()
    segment = write_segment(out, documents(tokens, starts), vocab_size=vocab_size)
    print(json.dumps({"inside_s": time.perf_counter() - start, "tokens": len(segment)}))


if __name__ == "__main__":
    main()
