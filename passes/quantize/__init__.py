"""Quantises layers to 8 bits, weights and activations (W8A8), towards the dense model; keeps every mask.

`placement` says where activations are quantised, `observers` with which range, `rounding` how weights are rounded.
"""
