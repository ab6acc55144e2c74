"""A model in llama.cpp: loading, sessions, generation, and the routing trace."""
