"""The colours of pictures: distinct for colour-blind people, on white and on black.

Okabe and Ito's palette ("Color Universal Design", jfly.uni-koeln.de/color, 2008), and shades of two of its blues.
"""

from __future__ import annotations

# Weights of components, from the bottom up.
WEIGHTS = ("#0072B2", "#56B4E9", "#7B6FC4", "#2B4C7E", "#A9C6E8", "#5E7C99")
ACTIVATIONS = "#E69F00"
WORKSPACE = "#CC79A7"
PINNED = "#009E73"
HOST = "#8FCFB9"
LIMIT = "#D55E00"
CHOSEN = "#009E73"
FITS = "#56B4E9"
TOO_LARGE = "#D55E00"
MEASURED = "#CC79A7"
# Lines and grids, visible on both backgrounds.
NEUTRAL = "#808080"
