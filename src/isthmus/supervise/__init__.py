"""Watches a step that trains: signals say what goes wrong, the ladder decides, the gate lets it change pools."""
