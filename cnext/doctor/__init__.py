"""`cnext doctor`: checks whether a run can start on this machine, and how to fix what prevents it.

It changes and downloads nothing. Checks of installed packages are in `cnext.packages`, which runs use as well.
"""
