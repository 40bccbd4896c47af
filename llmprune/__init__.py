"""Structured pruning for any PyTorch model: trace, score, plan, compact, verify, save."""
