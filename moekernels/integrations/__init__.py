"""Adapters that put the ops behind other libraries' interfaces; each one is imported by itself."""
