"""What a pipeline is made of, from a live object, a folder or a bundled profile."""
