"""Attention mechanisms, one folder each: definition (oracle), operation (fast function) and layer (module)."""
