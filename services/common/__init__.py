"""Code that at least two services share."""
