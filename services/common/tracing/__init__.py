"""Traces of requests across the services, off unless a place to export them to is given."""
