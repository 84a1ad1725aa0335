"""Recipes: scripts that train, evaluate and design; installed as `hydrogel_gym.train`."""
