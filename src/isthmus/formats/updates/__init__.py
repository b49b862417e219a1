"""New versions of weights on their way to an engine: deltas, their wire form, folders and publishers."""
