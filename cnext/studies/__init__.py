"""`cnext-run`: its flags, studies of several runs (in sequence, in parallel, on Ray or Slurm), dry runs, forecasts.

A single run is executed by `training`; tables over runs are computed in `tables`.
"""
