"""Error types of wrong answers (hallucination, instruction unfollowing, other) by rules or by a judge model.

A model is asked two yes/no questions about answers that no rule decides. The rules are in ``cnext.scoring.errors``.
"""
