"""Ouro (arXiv 2510.25741): all layers and the final norm are the loop, with a learned exit gate."""
