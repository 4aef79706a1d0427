"""Helpers independent of pipelines: strict YAML, files, versions, progress bars, values that print themselves."""
