"""What is decided: fields and units, polymers, patients, the reward of a design, an episode."""
