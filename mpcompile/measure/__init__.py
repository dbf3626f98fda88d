"""Measurements: interleaved latency, accuracy on held-out images, and a verdict for each masked layer."""
