"""Training quality: methods against single-task training on the data sets of the field.

``python -m benchmarks.quality STUDY...`` trains what the study files of ``configs/`` list, and
writes results and pictures; see ``--help``.
"""
