"""Two-tower retrieval: from raw files to recommendations that were judged on the whole catalogue."""
