"""Detect a machine: accelerators, host memory, disk, and the memory of each that may be used."""
