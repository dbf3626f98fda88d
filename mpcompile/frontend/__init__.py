"""From a file or a name to a captured model: weights file -> nn.Module -> Model."""
