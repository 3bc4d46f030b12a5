"""Vectors of many pictures on disk: written in shards that appear whole or not at all, searched, sorted out."""

from .recipe import Plan, Recipe, recipe_of
from .run import Model, write
from .store import Store
from .target import Target

__all__ = ["Model", "Plan", "Recipe", "Store", "Target", "recipe_of", "write"]
