"""The verbs of the console program ``nt-hf``: each is a module with a function ``main(argv=None)``."""
