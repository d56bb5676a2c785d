"""`cnext-run`: flags, and several runs one after another, side by side, or on Ray and Slurm; dry runs and forecasts.

A single run is done by `training`; the tables over runs are made in `tables`.
"""
