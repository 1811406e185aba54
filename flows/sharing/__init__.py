"""State on servers, for several machines: a database, an object store, a lock between machines."""
