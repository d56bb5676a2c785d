"""What `cnext.run` and `cnext.study` return, and `cnext.open_run` and `cnext.open_study` read: results to look at.

Nothing is computed here: figures come from run folders, means from `cnext.tables`, pictures from `cnext.report`.
"""

from cnext.results.run import RunResult, open_run
from cnext.results.study import StudyResult, open_study

__all__ = ["RunResult", "StudyResult", "open_run", "open_study"]
