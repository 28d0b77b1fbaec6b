"""What all other parts stand on: records, checks, canonical views."""
