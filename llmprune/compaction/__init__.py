"""Removes what a plan removes, in place, and checks that the result equals its masked reference."""
