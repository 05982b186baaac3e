"""Load tests of each service alone, between simulated neighbours that speak the real protos."""
