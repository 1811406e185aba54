"""The state root: its layout, its locks and databases, and the servers that several machines share it through."""
