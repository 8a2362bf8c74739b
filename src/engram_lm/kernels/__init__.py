"""CPU kernels in numba, each with a plain twin that the tests compare it with. Nothing here imports torch.

compiled.py      `kernel`, the decorator of all of them: compiled at the first call, and kept on disk
disk_cache.py    where compiled kernels are kept, and which sources they are kept for
announcing.py    who is told that a kernel is being compiled: the command line
"""
