"""Who listens where, and how clients come in: sockets, connections, tokens, TLS."""
