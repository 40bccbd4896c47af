"""Hands a pruned checkpoint on to other runtimes."""
