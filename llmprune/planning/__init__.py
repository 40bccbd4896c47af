"""Decides what goes: allocation of a budget over axes, selection within each, targets a person would set."""
