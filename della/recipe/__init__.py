"""What a recipe says: YAML or Python objects to a Recipe; strict, every mistake with its line."""
