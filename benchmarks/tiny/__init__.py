"""Recipes: tiny, randomly initialised models of the classes transformers ships, to try llmprune on.

A recipe is material for a test, so here architectures may be named; llmprune itself knows none. Each room has a tuple
``RECIPES``: text decoders, mixtures of experts, state space and linear attention models, encoders, sequence to
sequence, vision, speech and multimodal.
"""

from __future__ import annotations

from importlib import import_module

from tiny.recipe import TASKS, Recipe, build, small

__all__ = ["ROOMS", "TASKS", "Recipe", "build", "recipes", "small"]

ROOMS = ("decoders", "experts", "recurrent", "encoders", "seq2seq", "vision", "speech", "multimodal")
"""The modules with recipes, in the order of the table."""


def recipes() -> dict[str, Recipe]:
    """Every recipe by its name, in the order of the table."""
    found: dict[str, Recipe] = {}
    for room in ROOMS:
        for recipe in import_module(f"tiny.{room}").RECIPES:
            if recipe.name in found:
                raise ValueError(f"two recipes are called {recipe.name}")
            found[recipe.name] = recipe
    return found
