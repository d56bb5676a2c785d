"""Tasks: suites and their manifests, readers of file formats, checks of data files, and the synthetic suite.

Here is what a task consists of and how its samples are read; not how they are encoded, which is ``cnext.backbones``,
nor how answers are scored, which is ``cnext.scoring``.
"""
