"""The ladder: small rungs from the driver up to the whole layer, each a process of its own, so that
a card that is at hand for minutes says where the first thing goes wrong. `climb.py` runs them.

On a GPU the probes run as nvcc's machine code and as PTX that the driver compiles, the ops from the
built library. Without one (`--rehearse`) the PTX emulator executes the same kernels and launchers.
"""
