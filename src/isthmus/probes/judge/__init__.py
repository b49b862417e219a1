"""From what probes saw to what may be said: failure rates, thresholds, trends and their intervals."""
