"""Models on more than one machine."""
