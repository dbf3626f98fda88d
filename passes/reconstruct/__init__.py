"""Layer-wise reconstruction: refits weights by least squares from the second moments of each layer's inputs."""
