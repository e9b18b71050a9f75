"""Checkpoints judged while a trainer writes them, and the curve that they make."""
