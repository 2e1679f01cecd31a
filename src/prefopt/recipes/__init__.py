"""Recipes: YAML and the command line, turned strictly into dataclasses."""

from .locate import locate, packaged_names
from .recipe import Recipe, build, read_recipe

__all__ = ["Recipe", "build", "locate", "packaged_names", "read_recipe"]
