"""Output for people: the console, TensorBoard, the table of runs."""
