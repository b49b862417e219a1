"""The recipe: a strict TOML file that says everything a run does."""

from isthmus.recipe.architecture import architecture_from_config as architecture_from_config
from isthmus.recipe.architecture import parse_architecture as parse_architecture
