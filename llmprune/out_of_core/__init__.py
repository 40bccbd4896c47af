"""Works on a checkpoint that does not fit in memory, block by block from its shards."""
