"""The commands of ``ppl``, a module per group; each imports torch only when it runs. Put together in ``inference.cli``."""
