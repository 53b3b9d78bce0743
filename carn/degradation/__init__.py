"""HR to LR: how the input that networks are trained and judged on is made."""
