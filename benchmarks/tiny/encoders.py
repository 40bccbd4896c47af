"""Recipes: encoders."""

from __future__ import annotations

from tiny.recipe import Recipe

RECIPES: tuple[Recipe, ...] = ()
