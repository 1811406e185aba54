"""The state root: its layout, its locks and small files, and the servers that several machines share it through."""
