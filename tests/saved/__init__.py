"""What version 0.1 saved must load."""
