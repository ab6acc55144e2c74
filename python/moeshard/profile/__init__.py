"""Profiles: what traffic asks of experts, measured, and how far it can be trusted."""
