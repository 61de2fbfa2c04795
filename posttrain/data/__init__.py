"""Data: rows of any supported format to token ids, masks and side columns; procedural tasks with verifiable answers."""
