"""Requests that outlive their calls (ON_DISCONNECT_KEEP): what came is kept here and in a journal in Redis."""
