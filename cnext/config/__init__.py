"""Configuration: which run to do (`RunConfig`), with every name looked up (`Plan`), and learning-rate schedules.

Nothing here loads a model or reads data (`training`), or parses the command line (`studies.flags`).
"""
