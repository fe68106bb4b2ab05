"""A Hypeman server without virtual machines, as a program of its own: it answers as Hypeman's documents and sources do.

``python -E -s -S -m tests.hypeman_server DIRECTORY PORT [CERTIFICATE KEY]``.
All that it knows is in files, which it reads at each request: it may be killed
and started again, and whoever edits ``guests/<id>.json`` is an operator at the
VMM's own socket. ``faults.json`` says what goes wrong next. Standard library
alone, and little of that: it is started anew for each of many tests.
"""
