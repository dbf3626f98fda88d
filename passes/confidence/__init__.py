"""Gives the compressed model the dense model's confidence back, by a factor on the logits that is folded into weights.

The pass is in confidence.py, the fit in fit.py; logit_layers.py finds the layers, and fold.py scales them.
"""
