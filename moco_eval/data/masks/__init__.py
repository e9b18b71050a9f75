"""Images with semantic masks."""
