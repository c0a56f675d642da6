"""Native kernels for CPUs: C++ in ``csrc``, compiled once for each instruction set.

``build`` compiles them, ``library`` loads them and chooses the instruction set.
"""
