"""One Strategy measured in its own process: the worker's side and the search's side."""
