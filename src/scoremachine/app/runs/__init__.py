"""What the commands do on disk: one module for generation, one for each family of commands."""
