"""Figures of a report. Each takes plain data and gives a matplotlib ``Figure``.

``layers`` is always the ``layers`` of one stage; a layer that lacks what a figure shows is left
out. With ``dark=True`` a figure is drawn for a dark page.
"""
