"""The packages around us: transformers, peft, lm-eval, vLLM.

Each module here imports the package it serves, and is imported only when that package is used; this file imports
nothing. What it gives up for that: names are reached by module, e.g. ``sparsert.integrations.peft.merge_masked``.
"""
