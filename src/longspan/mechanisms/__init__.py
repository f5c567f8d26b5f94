"""Mechanisms, one folder each: definition, operation and layer side by side."""
