"""Hostile and damaged input in bulk: what della must refuse in its own words, quickly, and without harm.

`campaigns` holds the table of campaigns, a function each; `job` what they are given and what they report;
``python -m fuzz`` runs them.  A case is a function of the seed and its number, so a failure can be repeated.
"""
