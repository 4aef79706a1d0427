"""From a described pipeline and a budget to a choice. Pure: the same values give the same plan."""
