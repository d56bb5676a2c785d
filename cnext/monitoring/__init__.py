"""Monitoring: progress bars, also in notebooks, time left, heartbeat, ``cnext status``, signals, and errors of memory or
disk that is full.

Nothing here affects results.
"""
