"""``results.json``, its table, and the HTML report."""
