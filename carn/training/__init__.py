"""Training: losses and objectives, patches, and the loop that improves a model with them."""
