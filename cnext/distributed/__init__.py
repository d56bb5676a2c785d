"""Runs in several processes: collectives, the process group, and sharded models (FSDP2, DeepSpeed ZeRO).

In a single process every collective is the identity. How batches and samples are sharded is up to `training`.
"""
