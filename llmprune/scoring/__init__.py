"""Estimates how much each group of an axis matters, from calibration samples or from the weights alone."""
