"""What `isthmus run` does, in order: qualify, plan, train, rl, handoff, report; and serve."""
