"""The commands of the terminal, grouped by file."""
