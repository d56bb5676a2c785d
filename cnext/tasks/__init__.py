"""Tasks: manifests, readers of their file formats, orders, and the synthetic suite."""
