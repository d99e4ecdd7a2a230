"""Weights of linear layers in few bits: how torchao makes and keeps them."""
