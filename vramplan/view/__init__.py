"""Show values as text, HTML and pictures."""
