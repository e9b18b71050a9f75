"""Encoders: building them, recognising and loading anyone's checkpoint with proof, exporting it."""
