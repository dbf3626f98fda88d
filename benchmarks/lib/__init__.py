"""What benchmarks share: results files, calls in turns, real models, and programs that run beside."""
