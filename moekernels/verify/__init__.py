"""Proof that a layout computes what one process computes.

Rank 0 runs each step alone first and records the expert choices; then all ranks run the same
microbatches with the same parameters on the layout, with those choices replayed, and every rank
compares its part of every gradient. Training's own model, pipeline and gradient reduction are what
runs on both sides.

The layout still makes its own choice of experts. It may differ from the recorded one only where the
scores are too close to tell apart, and such tokens are counted.
"""
