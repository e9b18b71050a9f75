"""What this machine is, measured, and whether anything about it is broken."""
