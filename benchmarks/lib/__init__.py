"""Shared by the benchmarks: results files, interleaved CPU timing, pretrained models, and workers run as processes."""
