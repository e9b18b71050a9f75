"""From images to features, once."""
