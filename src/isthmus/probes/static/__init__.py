"""What a chip's tables alone say of a model: operators, dtypes, collectives and a lower bound of the time."""
