"""Error types of wrong answers: by rules, then by a model that answers two yes/no questions.

A model is asked only about answers that no rule decides, and the error type is derived here from its two booleans.
The rules that every evaluation applies are in `scoring.errors`.
"""
