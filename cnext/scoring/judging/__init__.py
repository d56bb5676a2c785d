"""What went wrong in an answer that fell short: by rules, then by a model that answers two yes/no questions.

A model only ever sees what no rule decides, and the label is derived here, from its two booleans alone.
"""
