"""From a profile to plans. Pure: arrays in, plan out."""
