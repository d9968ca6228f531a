"""How fast an engine is, against eager or another engine, once it is shown to be right.

First the gate: both sides score the same rows, and over budget there are no numbers. Then every
measure takes turns between the two sides in blocks, on the same threads, and medians are compared.
A ratio above 1 means that the engine is the faster one, or the smaller. Starting up and memory are
those of processes of their own.
"""
