"""What at least two services share."""
