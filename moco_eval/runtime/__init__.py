"""The machine: devices, processes, interruption, files, the terminal."""
