"""What a machine compares pictures with."""
