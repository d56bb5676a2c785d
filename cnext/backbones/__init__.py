"""Backbones: dual-to-dual models behind one small interface."""
