"""A look at a sample of the training data with the base model, before anything is trained."""
