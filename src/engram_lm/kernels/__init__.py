"""What every compiled function of the package stands on. The functions stand in the rooms that call them, each beside its
plain twin. Nothing here imports torch.

compiled.py      `kernel`, the decorator of all of them: compiled at the first call, and kept on disk
disk_cache.py    where compiled kernels are kept, and which sources they are kept for
announcing.py    who is told that a kernel is being compiled: the command line
checksums.py     XXH64; pointers.py: numbers at addresses; bits.py: bits that are set
"""
