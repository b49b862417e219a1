"""Starting the ranks of a stage."""
