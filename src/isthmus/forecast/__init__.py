"""Forecasts by pure arithmetic: exact counts of a model, and how long a run will take. Nothing here loads torch."""
