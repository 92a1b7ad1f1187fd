"""What is told of results: intervals, tables, plots, the page."""
