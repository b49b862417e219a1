"""Probes: what can be found out about a pool in seconds. Each returns what it saw; a stage draws the conclusion."""
