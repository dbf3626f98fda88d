"""int8: weights and activations as integers with a scale, chosen together with the N:M masks."""
