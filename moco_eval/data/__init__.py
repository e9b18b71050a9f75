"""Data sets for pretraining and evaluation; images come as 8-bit RGB."""
