"""CPU kernels in numba, each with a plain twin that the tests compare it with. Nothing here imports torch."""
