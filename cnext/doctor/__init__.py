"""`cnext doctor`: checks whether a run can start here, and says what to do where it cannot.

It changes nothing. Which packages are installed is looked up in `cnext.packages`.
"""
