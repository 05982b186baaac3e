"""Neighbours of a service under load: clients, edges, schedulers and executors that cost next to nothing."""
