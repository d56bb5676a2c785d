"""Contract tests for methods, backbones and scorers of other packages: the ones that cnext's own have to pass.

They run on a CPU, in seconds to a minute, without pytest and without a download. What a component computes is not
checked here, but what every one of its kind may change, keep and return; a test of its own holds it to its mathematics.
"""

from cnext.testing.backbones import BACKBONE_CHECKS, check_backbone
from cnext.testing.methods import METHOD_CHECKS, check_method
from cnext.testing.scorers import SCORER_CHECKS, check_scorer

__all__ = [
    "BACKBONE_CHECKS",
    "METHOD_CHECKS",
    "SCORER_CHECKS",
    "check_backbone",
    "check_method",
    "check_scorer",
]
