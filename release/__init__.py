"""Builds, checks and numbers a release: ``make dist``, and what the release workflow runs."""
