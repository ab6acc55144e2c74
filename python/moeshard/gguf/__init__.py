"""What a GGUF file holds, and which model that is."""
