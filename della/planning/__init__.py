"""From a recipe and headers to a Plan: what a merge will do, whether its models fit, and what it costs."""
