"""Strangers' bytes, read without executing any of them."""
