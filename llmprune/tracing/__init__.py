"""Reads a model's structure: records its operations, solves which sizes are coupled, and gives the graph of axes."""
