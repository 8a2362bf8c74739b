"""Commands about indexes of documents."""
