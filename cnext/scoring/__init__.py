"""Scoring: answers to scores, scores to a matrix, a matrix to metrics."""
