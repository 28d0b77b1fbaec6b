"""The ground of all other parts: records, checks, canonical views."""
