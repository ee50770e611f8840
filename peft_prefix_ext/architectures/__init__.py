"""Prefix layers of architectures that need more than K/V and a mask: one module for each kind of attention."""
