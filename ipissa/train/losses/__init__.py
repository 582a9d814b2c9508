"""What training minimises: pure functions of tensors, one file per idea."""
