"""Layer-wise reconstruction: least squares from the second moments of each layer's inputs."""
