"""Cameras and the way a frame takes into a Redis stream. A leaf: knows no torch, no ray and no other package."""
