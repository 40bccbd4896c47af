"""Makes up for what went: least squares on the consumers of a pruned axis."""
