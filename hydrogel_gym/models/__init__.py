"""What predicts the outcomes of a design: the contract, and the models that keep it."""
