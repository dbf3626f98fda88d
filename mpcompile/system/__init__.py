"""Processes, disk, memory, hardware and progress: everything that does not know about models."""
