"""The search: what may be tried, in which order, and which setting won."""
