"""Read-only facts of a model: spectra, multiply-accumulates, which layers can be masked, attention."""
