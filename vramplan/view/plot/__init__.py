"""Draw simulations and plans: as SVG or PNG with matplotlib, as one HTML file with plotly."""
