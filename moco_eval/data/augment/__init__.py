"""From an image to what a network sees of it."""
