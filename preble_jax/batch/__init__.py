"""Offline inference: the engine in the caller's process, no network."""
