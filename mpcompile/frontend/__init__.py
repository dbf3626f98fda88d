"""File or name -> nn.Module with its weights -> captured Model."""
