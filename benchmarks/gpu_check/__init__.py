"""All that a GPU has to show: is it right, does it hold, how fast are stages and kernels."""
