"""Shards: written, put together again, and checked."""
