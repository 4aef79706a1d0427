"""The commands, those of a kind in a file."""
