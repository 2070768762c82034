"""Choice of settings on held-out images."""
