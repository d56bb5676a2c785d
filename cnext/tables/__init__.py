"""Tables over runs: means over seeds and orders, paired differences, and comparisons with the paper.

The metrics of one score matrix are in `scoring.matrix`; why a model forgets is in `analysis`.
"""
