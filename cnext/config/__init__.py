"""Configuration of a run (`RunConfig`), the same with every name resolved (`Plan`), and learning-rate schedules.

Nothing here loads a model or reads data (`training`), or parses the command line (`studies.flags`).
"""
