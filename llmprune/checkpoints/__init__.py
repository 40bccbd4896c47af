"""Writes a pruned model so that every tool loads it, and reads it back."""
