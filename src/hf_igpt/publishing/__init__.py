"""What leaves the house: published repositories, their cards, converted checkpoints."""
