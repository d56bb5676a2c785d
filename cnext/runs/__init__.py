"""The files of a run: its folder, checkpoints, logs, schemas, state hashes, environment and fingerprint.

Everything here can be read without the model. What is computed from several runs is in `tables` and `analysis`.
"""
