"""Choose the settings of a described pipeline within a budget. Pure: the same values give the same plan."""
