"""tinymoe: trains the small Mixture-of-Experts models that ship with moeshard."""
