"""Monitoring: progress bars, also in notebooks, time left, heartbeat, ``cnext status``, signals, and out-of-memory or disk-full errors.

Nothing here affects results.
"""
