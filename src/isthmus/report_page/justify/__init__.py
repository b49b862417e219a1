"""The paper for an authority or a board: which steps of a run go to foreign chips, why, and what would change that."""
