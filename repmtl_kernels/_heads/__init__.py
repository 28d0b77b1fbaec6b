"""What task heads need: second derivatives, and checks that they have them."""
