"""A failing probe as a small script: packed, shrunk, and run where only torch is."""
