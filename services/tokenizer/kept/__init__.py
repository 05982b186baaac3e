"""Requests that outlive their calls (ON_DISCONNECT_KEEP). Their results are kept in memory and in a journal in
Redis."""
