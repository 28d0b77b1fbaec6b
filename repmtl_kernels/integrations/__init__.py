"""Rep-MTL in other libraries: ``libmtl``, ``torchjd``, ``lightning``, ``transformers``.

Each is a module of its own, imported by name, since it needs its library.
"""
