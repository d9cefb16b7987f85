"""Other tools that choose training settings, on the same model, data and machine, each in a venv of its own."""
