"""Data sets, the images of each step, the noise in them, and how they reach the device."""
