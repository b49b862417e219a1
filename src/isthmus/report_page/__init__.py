"""What the dossier is drawn with: charts, words for numbers, the template and its style sheet."""
