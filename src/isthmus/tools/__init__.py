"""What a person does beside a run: one verb a file."""
