"""Task heads: their second derivatives, and checks that they have these."""
