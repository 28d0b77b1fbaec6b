"""Rep-MTL in other libraries. One module each, imported by name, as it needs its library:
``libmtl``, ``torchjd``, ``lightning``."""
