"""What a decoder is made of, as pure data: no kernel, no process group, no tensor.

Each part is a module: a dataclass of its fields (TOML keys, flags, help, limits) and three
functions of the whole specification that count what the part holds and does,

    parameters(spec, at, active)   weights on a rank
    kept(spec, at)                 bytes kept from forward to backward of a microbatch
    work(spec, at)                 FLOPs and bytes of a forward pass, a token

`decoder` puts the parts together. Modules are built from the specification, the planner folds the
counts, and the command line reads the fields.
"""
