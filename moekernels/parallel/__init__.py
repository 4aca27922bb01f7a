"""Meshes and collectives: everything that knows of ranks and nothing that knows of layers."""
