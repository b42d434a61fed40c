"""Sites: the places in a model that adapters can change, and how to find them."""
