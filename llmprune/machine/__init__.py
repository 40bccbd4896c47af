"""Knows the machine: its processors, memory and clocks, CUDA or why not, signals."""
