"""One self-contained HTML page about runs: what came out, how it went, how it looks, where it comes from."""
