"""Formats that store a model's modules in different types, chosen by what each costs."""
