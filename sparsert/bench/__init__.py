"""Measuring: kernels, decode steps, memory, against peers in the same run; every run leaves one record.

Nothing is imported here, so that asking for help or reading a record needs no torch:
``records`` (the schema), ``timing`` (graphs, events, rotation past L2, roofs), ``options`` (what every
command takes), then one module a command with ``add_options(parser)`` and ``run(arguments)``.
"""
