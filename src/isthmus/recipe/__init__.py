"""The recipe: a strict TOML file that says everything a run does."""
