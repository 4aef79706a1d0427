"""Search for the smallest cards and the largest workloads, for `fit`."""
