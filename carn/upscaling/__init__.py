"""LR pixels of any size to SR pixels: windows, context round them, precision, engines."""
