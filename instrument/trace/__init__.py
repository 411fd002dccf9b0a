"""Profiler traces of a window of steps, with tracks of our own in them, and the time table they give."""
