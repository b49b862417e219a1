"""What the inputs of a model's modules look like, and what formats make of it: ranges, balance, rounding."""
