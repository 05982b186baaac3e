"""Servers around libraries that bring none. They run in the libraries' own environments: little may be imported."""
