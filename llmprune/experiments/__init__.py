"""Compares: sweeps over settings, the paper's tables, baselines."""
