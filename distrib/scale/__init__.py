"""A run on paper: what a config's training would cost on any number of GPUs, without one at hand."""
