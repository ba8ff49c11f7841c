"""A trained network looked into: its loss landscape, its filters and what excites them, the geometry of its windows.

    grid.py       a landscape's points as a file that grows, is killed and goes on; read back without torch
    landscape.py  the loss along lines and over planes of weights
    filters.py    filters, feature maps, what excites a channel, which pixels a decision hangs on
    geometry.py   what stride and padding do: sizes, borders, receptive field

Everything here reads a model and leaves it as it was, to the bit; figures are drawn elsewhere, from the arrays.
"""
