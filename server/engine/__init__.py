"""What runs the model: the interface, and the engines behind it."""
