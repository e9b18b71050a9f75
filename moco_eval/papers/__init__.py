"""Published tables, and our result records beside them, like against like only. See docs/comparing.md."""
