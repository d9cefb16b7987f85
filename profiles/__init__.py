"""Profiles measured on real devices, shipped with autotune and read last. Data only."""
