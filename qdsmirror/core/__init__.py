"""Pure logic: formats, geometry, recovery decisions, codecs and state machines.

Nothing here imports Twisted, opens a file or asks for the time (kept by tests/test_imports.py).
"""
