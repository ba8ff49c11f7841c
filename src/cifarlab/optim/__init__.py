"""Optimizers, learning-rate schedules, averaged weights. Import them from their own files.

`schedules` must work where torch is not installed, so nothing is imported here.
"""
