"""The runs behind the command line: configuration, ranks, optimiser, loop, checkpoints, proof."""
