"""Forecasts by pure arithmetic, and by what published results teach. Nothing here loads torch or scipy."""
