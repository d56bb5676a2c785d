"""What a run shows while it goes on: progress, time left, heartbeat and status; signals and resource errors.

Nothing here decides a number of the results.
"""
