"""Tells what happened: logs of runs, tables, plots, and pages."""
