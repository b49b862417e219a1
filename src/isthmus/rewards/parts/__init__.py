"""What rewards share."""
