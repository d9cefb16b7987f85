"""Studies that are shipped: grids of techniques and batch sizes, one TOML file each (autotune/study/definition.py)."""
