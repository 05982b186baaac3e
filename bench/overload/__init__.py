"""What happens beyond capacity: refusals, and tenants beside each other."""
