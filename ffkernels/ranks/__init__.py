"""Several processes: what they tell each other, and how a model is spread over them."""
