"""What a model can do on given GPUs: layouts, memory, contexts and times, without any of them."""
