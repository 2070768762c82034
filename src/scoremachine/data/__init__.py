"""Images: reading, decoding, keeping them, and their statistics."""
