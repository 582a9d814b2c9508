"""Ways to teach an adapter what its two poles mean, behind one interface."""
