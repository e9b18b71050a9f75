"""Every schema and its loading, free of torch."""
