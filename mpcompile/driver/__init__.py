"""The front doors, a file each. They alone know both passes and runtimes."""
