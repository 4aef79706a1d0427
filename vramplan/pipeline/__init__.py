"""Describe the components of a pipeline, from a live object, a folder, the hub or a bundled profile."""
