"""Plans on a real pipeline: load, apply, undo, measure."""
