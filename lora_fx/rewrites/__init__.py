"""Rewrites of an injected graph for training: one file for each, with what it finds before and leaves after.

They work on a copy that is only compiled. The graph that fold, save, export and the other passes read stays the plain
one, so that none of them has to know what an optimisation did. See `optimization.py`.
"""
