"""xdistil: distil a big transformer encoder into a small fast one.

Letters in every docstring: B batch, S tokens (sub-words), N sentences or windows, L layers,
A attention heads, H_t and H_s teacher and student widths, C labels, V vocabulary.
Importing this package loads nothing heavy.
"""

__version__ = "0.1.0"
