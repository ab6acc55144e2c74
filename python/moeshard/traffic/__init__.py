"""Text to measure on: its domains, and how it is cut into windows."""
