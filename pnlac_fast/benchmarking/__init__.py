"""Measurements of this package against others and against the machine, each checked for its result first."""
