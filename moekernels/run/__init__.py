"""What a run is, as pure data: the sections of its TOML file, presets, flags.

`sections` has the keys, `files` reads and writes them.
"""
