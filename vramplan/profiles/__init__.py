"""Facts about known pipelines and cards, read from YAML."""
