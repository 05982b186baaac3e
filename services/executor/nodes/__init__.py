"""Several hosts of one executor: node 0 serves and leads, the other nodes wait for it and run ranks."""
