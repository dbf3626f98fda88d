"""The machine beneath: processes, disk, memory, hardware and progress. It knows nothing of models."""
