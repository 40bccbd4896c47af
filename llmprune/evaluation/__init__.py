"""Measures a model: perplexity, zero-shot tasks, generation, latency."""
