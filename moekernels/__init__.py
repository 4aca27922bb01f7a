"""moekernels: Mixture-of-Experts training from the kernel up. See README.md for the map."""

__version__ = "0.1.0"
