"""Protocol, statistics, twin replay, gates, report: what tells a gain in imagination from a gain."""
