"""Several processes: collectives, process groups, and sharded models (FSDP2, DeepSpeed ZeRO).

Without a launcher every function is the identity. Which steps a process takes is decided in `training`.
"""
