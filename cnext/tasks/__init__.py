"""Tasks: manifests, readers of their file formats, orders, and the synthetic suite.

How an answer is scored is in `scoring`; how samples become batches is in `training`.
"""
