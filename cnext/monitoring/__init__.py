"""Monitoring: progress bars, also in notebooks, time left, heartbeat, ``cnext status``, signals, and errors of full
memory and disks.

Nothing here affects results.
"""
