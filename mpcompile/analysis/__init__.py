"""Read-only facts of a model: spectra, multiply-accumulates, eligible layers, attention, and torch's operator sets."""
