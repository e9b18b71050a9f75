"""Data sets by name, their decoding, transforms and loaders."""
