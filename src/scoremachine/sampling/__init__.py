"""From noise to pictures."""
