"""What a command does around an algorithm of ``compress``: options, text and models in, progress, state, files out."""
