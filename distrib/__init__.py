"""A run is (config, step, weights). Everything else is a function of the step."""
