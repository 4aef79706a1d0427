"""Helpers that know nothing of pipelines: YAML, files, versions, progress bars, values that print themselves."""
