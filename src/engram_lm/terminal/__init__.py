"""What memory does, made visible in a terminal: text that reddens, tables of what fired, the demo."""
