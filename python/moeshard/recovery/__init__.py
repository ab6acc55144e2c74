"""Recovery: what a shard's missing experts did, given back by the experts that it holds."""
