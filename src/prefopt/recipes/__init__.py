"""Recipes: YAML and the command line, turned strictly into dataclasses."""

from prefopt.recipes.recipe import Recipe, build, read_recipe
from prefopt.recipes.source import locate, packaged_names

__all__ = ["Recipe", "build", "locate", "packaged_names", "read_recipe"]
