"""On-policy data: sampling, ranking and pair building, and the formats of other projects."""
