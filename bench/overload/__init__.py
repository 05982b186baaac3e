"""Behaviour beyond capacity: refusals, and tenants beside each other."""
