"""One run: data and model set up, the training loop, evaluation after every task, results and cost.

Methods (what is trained, and how) are in `methods`; files of a run are in `runs`.
"""
