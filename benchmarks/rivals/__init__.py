"""Engines that are measured side by side, and the load that they get."""
