"""An encoder in another library's format, with proof."""
