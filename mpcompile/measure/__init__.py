"""Measurements: latency side by side, accuracy on images, and what became of each layer."""
