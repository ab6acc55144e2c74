"""The OpenAI-compatible server: what clients ask, who answers, and how it comes back."""
