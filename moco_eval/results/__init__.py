"""What came out: records, statistics, comparisons."""
