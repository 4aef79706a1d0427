"""The search behind `fit`: smallest cards, largest workloads."""
