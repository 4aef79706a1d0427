"""A plan on a real pipeline: load it, apply it, undo it, measure it."""
