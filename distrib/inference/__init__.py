"""Using the result of a run."""
