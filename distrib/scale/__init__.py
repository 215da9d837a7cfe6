"""Predicts the speed and duration of a config's training on any number of GPUs, without using one."""
