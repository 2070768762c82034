"""Machines against networks and held-out images."""
