"""How long a product of Hopper takes, predicted by discrete events before any card runs it.

`card` holds what a GPU is, `kernel` what a kernel does to a tile, `walk` the order of the tiles,
`events` plays the kernel on the card, `layer` sums a layer, `published` holds the figures that the
few free constants are fitted to and those that they are judged by. All pure data and arithmetic.

Legend: T tokens, H hidden, F expert hidden, E experts, K top-k, R = T K rows. Times in cycles of
an SM unless a name says otherwise.
"""
