"""What is done with a run once it has been trained."""
