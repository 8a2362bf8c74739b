"""What a run needs before the first step: a base model, its tokenizer, and text cut into blocks."""
