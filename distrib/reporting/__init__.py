"""What people look at: the console, TensorBoard, the table of runs."""
