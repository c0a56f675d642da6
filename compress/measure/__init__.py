"""What compression cost: texts and questions, both models on them, and figures with intervals."""
