"""Results of a run: ``results.json``, its text table and the HTML report."""
