"""Keeps, the one idea of the house: which experts are held, bool (n_layer, n_expert)."""
