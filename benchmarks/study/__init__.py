"""Where each method pays: six experiments in one small world with a known true reward (`make study`)."""
