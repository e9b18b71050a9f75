"""Every classification protocol."""
